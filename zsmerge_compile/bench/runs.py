"""The calls of the benchmark whose records one file holds: what was run when, on what, and how fast that copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

# conditions without which two times cannot be compared
MACHINE = ("device", "processor", "cores", "threads", "cuda", "torch", "triton", "transformers", "zsmerge_compile")


@dataclass
class Run:
    """One call. Records name theirs by its number; floors come from its own copy bandwidth.

    number      from 1, within the file
    date        when it started, UTC
    conditions  hardware and versions (`machine.conditions`)
    """

    number: int
    command: str
    date: str
    conditions: dict[str, Any]
    copy_gb_per_s: float | None = None

    @property
    def machine(self) -> tuple[object, ...]:
        """Equal where times may be compared."""
        return machine(self.conditions)


def machine(conditions: Mapping[str, Any]) -> tuple[object, ...]:
    """What of the conditions makes a machine the same machine."""
    return tuple(conditions.get(name) for name in MACHINE)


def machines(runs: Iterable[Run]) -> dict[int, tuple[object, ...]]:
    """The machine of each run, by its number."""
    return {run.number: run.machine for run in runs}


def started(runs: Iterable[Run], command: str, conditions: Mapping[str, Any]) -> Run:
    """The run that begins now, after `runs`."""
    number = max((run.number for run in runs), default=0) + 1
    return Run(number, command, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), dict(conditions))
