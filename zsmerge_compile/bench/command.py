"""The command behind `tools/bench` and `zsmerge-compile bench`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from zsmerge_compile.bench import machine, plots, presets, report
from zsmerge_compile.bench.presets import Choice
from zsmerge_compile.bench.records import FAILED, SKIPPED, Record, Results, red
from zsmerge_compile.bench.rows import Group, fits
from zsmerge_compile.bench.session import Session, facts
from zsmerge_compile.cli.console import console, notes
from zsmerge_compile.errors import InputError, must

OURS = ("zsmerge", "prompt-full", "prompt-chunked", "loop", "generate", "op", "compile")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 where an op check is red or a row of ours failed."""
    device = torch.device(options.device or "cpu") if options.blank else find_device(options.device)
    choice = _choice(options, device)
    groups = presets.groups(options.suite or presets.default_suites(choice), choice)
    if options.list:
        for line in _plan(groups, device):
            console().print(line, markup=False, soft_wrap=True)
        return 0
    if options.blank:
        return _blank(groups, device, options.out)
    if options.threads:
        torch.set_num_threads(options.threads)
    started = time.monotonic()
    conditions = machine.conditions(device, sys.argv[1:])
    results = Results.open(options.out, conditions, options.append)
    said = notes()

    def say(text: str) -> None:
        said.print(f"[{time.monotonic() - started:6.1f} s] {text}", markup=False, soft_wrap=True)

    deadline = None if options.minutes is None else started + 60 * options.minutes
    session = Session(device, results, say, deadline)
    for group in groups:
        session.run(group)
        write(results)
    report.show(results, console())
    drawn = write(results)
    said.print(f"written: {options.out} and .txt" + (", .png" if drawn else "; plots need matplotlib"), soft_wrap=True)
    wrong = [r for r in results.records if r.status == FAILED and r.method in OURS]
    return 1 if red(results.records) or wrong else 0


def write(results: Results) -> bool:
    """The JSON, its tables as .txt and its plots as .png beside it; whether there is a .png."""
    results.save()
    report.write_text(results, results.path.with_suffix(".txt"))
    return plots.draw(results.records, results.path.with_suffix(".png"))


def _blank(groups: list[Group], device: torch.device, out: Path) -> int:
    """A file of rows that are all still to be measured, so that what a later run doesn't reach is seen."""
    rows = [(group, row) for group in groups for row in group.rows]
    made = [Record(**facts(group, row, device), status=SKIPPED, reason="not measured") for group, row in rows]
    unique = {record.key: record for record in made}  # suites overlap
    write(Results(out, {"device": "not measured"}, None, list(unique.values())))
    return 0


def find_device(name: str | None) -> torch.device:
    """The device asked for, or the GPU where there is one; raises InputError where it is not there."""
    gpu = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if gpu else "cpu"))
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not gpu):
        raise InputError(must("--device", "cuda (where torch finds one) or cpu", name))
    return device


def _choice(options: argparse.Namespace, device: torch.device) -> Choice:
    def several(values: list[int] | None) -> tuple[int, ...] | None:
        return tuple(values) if values else None

    return Choice(
        gpu=device.type == "cuda",
        quick=options.quick,
        model=options.model,
        layers=options.layers,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        batches=several(options.batches),
        contexts=several(options.contexts),
        budgets=several(options.budgets),
        rounds=options.rounds,
    )


def _plan(groups: list[Group], device: torch.device) -> Iterator[str]:
    """What would be measured: a line per group, one per row."""
    memory = machine.usable_memory(device)
    for group in groups:
        model = f"{group.shape.name}, {group.shape.depth} layers, {str(group.dtype).removeprefix('torch.')}"
        yield f"{group.suite}: {model}, about {group.seconds(device):.0f} s"
        for row in group.rows:
            need = fits(group, row, memory) or f"{group.need(row) / 2**30:.1f} GiB"
            yield f"    batch {row.batch}, {row.context:,} tokens, {row.label()}: {need}"
    yield f"in all about {sum(group.seconds(device) for group in groups) / 60:.0f} minutes"
