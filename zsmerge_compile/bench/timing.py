"""How long a step takes: steps in turn, medians, CUDA events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch

RUNS = 3  # every measurement is cut into this many runs, whose medians show how far it can be trusted


def _nothing() -> None: ...


@dataclass(frozen=True)
class Step:
    """Something to time.

    run          the work of `tokens` tokens
    prepare      puts the state back to where the row wants it, before every block of runs; not timed
    cache_bytes  bytes of the cache it reads
    held_bytes   bytes of it that are there before the call; None: all
    slots        tokens or slots per key/value head that attention runs over
    facts        more fields of the row's Record
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing
    tokens: int = 1
    cache_bytes: int = 0
    held_bytes: int | None = None
    slots: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Timing(NamedTuple):
    """Milliseconds per token: the median of all blocks, and the lowest and highest median among the runs."""

    ms: float
    low: float
    high: float
    rounds: int


class Plan(NamedTuple):
    """rounds: timed blocks of each step; warmup: untimed ones before; block: steps of a block, back to back."""

    rounds: int = 15
    warmup: int = 3
    block: int = 1


def measure(steps: Mapping[str, Step], plan: Plan, device: torch.device) -> dict[str, Timing]:
    """Time the steps in turn, a block of each per round, so that a slow spell of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    clock = _cuda_ms if device.type == "cuda" else _cpu_ms
    for turn in range(plan.warmup + plan.rounds):
        for name, step in steps.items():
            step.prepare()
            elapsed = clock(step.run, plan.block)
            if turn >= plan.warmup:
                times[name].append(elapsed / plan.block / step.tokens)
    return {name: summary(found) for name, found in times.items()}


def summary(times: list[float]) -> Timing:
    """The figures of one step from the milliseconds of its blocks, in the order they were taken."""
    size = max(1, len(times) // RUNS)
    runs = [median(times[start : start + size]) for start in range(0, size * min(RUNS, len(times)), size)]
    return Timing(median(times), min(runs), max(runs), len(times))


def _cpu_ms(run: Callable[[], object], block: int) -> float:
    started = time.perf_counter()
    for _ in range(block):
        run()
    return (time.perf_counter() - started) * 1e3


def _cuda_ms(run: Callable[[], object], block: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(block):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
