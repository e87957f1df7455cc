"""How long the steps of `tools/gpu_check` are expected to take, as far as their rows have not been measured yet."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.tasks import Task
from zsmerge_compile.bench.plan import missing, planned
from zsmerge_compile.bench.records import MEASURED, Results
from zsmerge_compile.bench.rows import Group, fits
from zsmerge_compile.bench.runs import machines
from zsmerge_compile.cli import bench

GPU = torch.device("cuda")
TESTS = 120.0  # seconds
START = 20.0  # seconds of a process before it measures


class Machine(NamedTuple):
    """What makes its figures comparable (`runs.machine`), and the bytes that rows may plan with."""

    key: tuple[object, ...]
    memory: int


def groups(task: Task) -> list[Group]:
    """What a step measures on a GPU; of the tests, nothing."""
    if not task.arguments:
        return []
    parser = argparse.ArgumentParser()
    bench.add(parser.add_subparsers())
    return planned(parser.parse_args(["bench", *task.arguments]), GPU)


def seconds_left(task: Task, results: Results, machine: Machine) -> float:
    """Of what `results` lacks of a step; 0 where nothing is left. Tests are due until there are figures."""
    if not task.arguments:
        known = machines(results.runs)
        ours = (record for record in results.records if known.get(record.run or 0) == machine.key)
        return 0.0 if any(record.status == MEASURED for record in ours) else TESTS
    left = missing(groups(task), results, machine.key, GPU, machine.memory)
    return START + sum(_fitting(group, machine.memory).seconds(GPU) for group in left) if left else 0.0


def _fitting(group: Group, memory: int) -> Group:
    return replace(group, rows=tuple(row for row in group.rows if fits(group, row, memory) is None))
