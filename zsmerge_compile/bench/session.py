"""Running groups: build a group's steps, check the kernels, time the steps in turn, record every row."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from zsmerge_compile.bench import machine, memory
from zsmerge_compile.bench.builder import Builder
from zsmerge_compile.bench.check import Verdict
from zsmerge_compile.bench.compile_time import compile_seconds
from zsmerge_compile.bench.records import FAILED, MEASURED, SKIPPED, Record, Results
from zsmerge_compile.bench.rows import Group, Row, fits, pack
from zsmerge_compile.bench.timing import Step, Timing, measure
from zsmerge_compile.errors import ZSMergeError

Say = Callable[[str], None]
CANNOT = "cannot be made: "  # begins the reason where a policy does not serve a budget or a model


class Session:
    """One run of the benchmarks on one device.

    memory    bytes that rows may plan with
    deadline  `time.monotonic()` after which no group is started; what is left is recorded as skipped
    say       told what is being done
    """

    def __init__(self, device: torch.device, results: Results, say: Say, deadline: float | None = None) -> None:
        self.device, self.results, self.say = device, results, say
        self.memory = machine.usable_memory(device)
        self.deadline = deadline
        self.bandwidth = results.run.copy_gb_per_s = machine.copy_bandwidth(device)
        self._model: tuple[object, Any] = (None, None)
        self._verdicts: dict[object, Verdict] = {}  # by kernel and shape, for the whole run

    def run(self, group: Group) -> None:
        """Measure a group; a row that can't be, or that fails, is recorded with the reason and the others go on."""
        reasons = {row: fits(group, row, self.memory) for row in group.rows}
        rows = [row for row, reason in reasons.items() if reason is None]
        late = self._late(replace(group, rows=tuple(rows)))
        for row, reason in reasons.items():
            if reason or late:
                self._skip(group, row, reason or late)
        if late:
            return
        for part in pack(group, rows, self.memory):
            if part[0].method == "compile":
                self._run_compile(group, part)
            else:
                self._run_part(group, part)

    def _late(self, group: Group) -> str:
        """Why there is no time for the group; empty if there is."""
        if self.deadline is None:
            return ""
        left, need = self.deadline - time.monotonic(), group.seconds(self.device)
        return f"not measured: about {need:.0f} s needed, {max(0, left):.0f} s left" if left < need else ""

    def _run_part(self, group: Group, rows: list[Row]) -> None:
        model = self._model_of(group)
        steps: dict[Row, Step] = {}
        peaks: dict[Row, memory.Peak] = {}
        before: dict[object, int] = {}  # by cache: what was allocated before it was made
        builder = Builder(model, self._verdicts, self.say)
        for row in rows:
            self.say(f"{group.suite}: {group.shape.name}, batch {row.batch}, {row.label()}: building")
            bare = before.setdefault(builder.cache_of(row), memory.allocated(self.device))
            try:
                step = builder.step(row)
                peaks[row] = self._warm(step, bare)
                steps[row] = step
            except ZSMergeError as error:
                if row.policy is None:
                    self._fail(group, row, error)
                else:
                    self._skip(group, row, CANNOT + str(error).splitlines()[0])
            except Exception as error:  # a baseline's, a compiler's or the device's; the next row may well run
                self._fail(group, row, error)
        if not steps:
            return
        self.say(f"{group.suite}: {group.shape.name}: {len(steps)} rows, {group.plan.rounds} rounds in turn")
        names = {str(index): row for index, row in enumerate(steps)}
        try:
            found = measure({name: steps[row] for name, row in names.items()}, group.plan, self.device)
        except Exception as error:
            for row in steps:
                self._fail(group, row, error)
            return
        for name, row in names.items():
            self._record(group, row, steps[row], found[name], peaks[row], builder.checks.get(row))
        steps.clear()
        del builder
        self._collect()

    def _run_compile(self, group: Group, rows: list[Row]) -> None:
        """Each in a process of its own with an empty compiler cache."""
        for row in rows:
            self.say(f"{group.suite}: {group.shape.name}, {row.context} layers, {row.label()}")
            try:
                seconds = compile_seconds(group.shape, row, group.dtype, self.device)
            except Exception as error:
                self._fail(group, row, error)
            else:
                self.results.add(Record(**group.facts(row, self.device), status=MEASURED, seconds=seconds, rounds=1))

    def _model_of(self, group: Group) -> Any:
        """The last model is kept: neighbouring groups share it."""
        key = (group.shape.name, group.shape.depth, group.dtype)
        if self._model[0] != key:
            self._model = (None, None)
            self._collect()
            self._model = (key, group.shape.build(self.device, group.dtype))
        return self._model[1]

    def _warm(self, step: Step, before: int) -> memory.Peak:
        """The first call, which may compile; then the peak of a second one."""

        def call() -> None:
            step.prepare()
            step.run()

        call()
        weights = sum(parameter.nbytes for parameter in self._model[1].parameters())
        held = step.cache_bytes if step.held_bytes is None else step.held_bytes
        return memory.peak(call, self.device, weights, held, before)

    def _collect(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _record(
        self, group: Group, row: Row, step: Step, timing: Timing, peak: memory.Peak, check: Verdict | None
    ) -> None:
        weights = 0 if row.method.startswith("op") else group.shape.weight_bytes(group.dtype)
        reads = weights + step.cache_bytes
        steps = row.method in ("dynamic", "static", "zsmerge", "plain", "op", "op-plain", "policy")
        floor = reads / self.bandwidth / 1e6 if steps else None
        figures: dict[str, Any] = {
            "ms": timing.ms,
            "ms_low": timing.low,
            "ms_high": timing.high,
            "rounds": timing.rounds,
            "warmup": group.plan.warmup,
            "weight_bytes": weights,
            "cache_bytes": step.cache_bytes,
            "gb_per_s": reads / timing.ms / 1e6 if steps else None,
            "floor_ms": floor,
            "share_of_floor": floor / timing.ms if floor is not None else None,
            "tokens_per_s": row.batch * 1e3 / timing.ms,
            "peak_bytes": peak.bytes,
            "peak_of": peak.of,
            "check": None if check is None else check.word,
            "check_text": None if check is None else check.text,
        }
        self.results.add(Record(**group.facts(row, self.device), status=MEASURED, **figures, **step.facts))

    def _skip(self, group: Group, row: Row, reason: str) -> None:
        self.results.add(Record(**group.facts(row, self.device), status=SKIPPED, reason=reason))

    def _fail(self, group: Group, row: Row, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
        if isinstance(error, torch.OutOfMemoryError):
            reason = f"out of memory (estimated {group.need(row) / 2**30:.0f} GiB)"
        self.say(f"failed: {row.label()}: {reason}")
        self.results.add(Record(**group.facts(row, self.device), status=FAILED, reason=reason))
        self._collect()
