"""Running groups: build a group's steps, check the kernels, time the steps in turn, record every row."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from zsmerge_compile.bench import machine
from zsmerge_compile.bench.builder import Builder
from zsmerge_compile.bench.check import Verdict
from zsmerge_compile.bench.compile_time import compile_seconds
from zsmerge_compile.bench.records import FAILED, MEASURED, SKIPPED, Record, Results
from zsmerge_compile.bench.rows import Group, Row, fits, pack
from zsmerge_compile.bench.timing import Step, Timing, measure

Say = Callable[[str], None]


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
        self.bandwidth = results.copy_gb_per_s = machine.copy_bandwidth(device)
        self._model: tuple[object, Any] = (None, None)
        self._verdicts: dict[object, Verdict] = {}  # by kernel and shape, for the whole run

    def run(self, group: Group) -> None:
        """Measure a group; a row that can't be, or that fails, is recorded with the reason and the others go on."""
        left = None if self.deadline is None else self.deadline - time.monotonic()
        need = group.seconds(self.device)
        rows = []
        for row in group.rows:
            reason = fits(group, row, self.memory)
            if left is not None and left < need:
                reason = f"not measured: about {need:.0f} s needed, {max(0, left):.0f} s left"
            if reason:
                self._skip(group, row, reason)
            else:
                rows.append(row)
        for part in pack(group, rows, self.memory):
            if part[0].method == "compile":
                self._run_compile(group, part)
            else:
                self._run_part(group, part)

    def _run_part(self, group: Group, rows: list[Row]) -> None:
        model = self._model_of(group)
        steps: dict[Row, Step] = {}
        peaks: dict[Row, int | None] = {}
        builder = Builder(model, self._verdicts, self.say)
        for row in rows:
            self.say(f"{group.suite}: {group.shape.name}, batch {row.batch}, {row.label()}: building")
            before = self._allocated()
            try:
                step = builder.step(row)
                peaks[row] = self._warm(step, group, before)
                steps[row] = step
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
                self.results.add(Record(**facts(group, row, self.device), status=MEASURED, seconds=seconds, rounds=1))

    def _model_of(self, group: Group) -> Any:
        """The last model is kept: neighbouring groups share it."""
        key = (group.shape.name, group.shape.depth, group.dtype)
        if self._model[0] != key:
            self._model = (None, None)
            self._collect()
            self._model = (key, group.shape.build(self.device, group.dtype))
        return self._model[1]

    def _warm(self, step: Step, group: Group, before: int) -> int | None:
        """The first call, which may compile; then the peak of a second one, less what other rows hold."""
        step.prepare()
        step.run()
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        step.prepare()
        step.run()
        torch.cuda.synchronize(self.device)
        weights = sum(parameter.nbytes for parameter in self._model[1].parameters())
        return torch.cuda.max_memory_allocated(self.device) - before + weights

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _collect(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _record(
        self, group: Group, row: Row, step: Step, timing: Timing, peak: int | None, check: Verdict | None
    ) -> None:
        weights = 0 if row.method.startswith("op") else group.shape.weight_bytes(group.dtype)
        reads = weights + step.cache_bytes
        steps = row.method in ("dynamic", "static", "zsmerge", "plain", "op", "op-plain")
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
            "peak_bytes": peak,
            "check": None if check is None else "green" if check.ok else "red",
            "check_text": None if check is None else check.text,
        }
        self.results.add(Record(**facts(group, row, self.device), status=MEASURED, **figures, **step.facts))

    def _skip(self, group: Group, row: Row, reason: str) -> None:
        self.results.add(Record(**facts(group, row, self.device), status=SKIPPED, reason=reason))

    def _fail(self, group: Group, row: Row, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
        if isinstance(error, torch.OutOfMemoryError):
            reason = f"out of memory (estimated {group.need(row) / 2**30:.0f} GiB)"
        self.say(f"failed: {row.label()}: {reason}")
        self.results.add(Record(**facts(group, row, self.device), status=FAILED, reason=reason))
        self._collect()


def facts(group: Group, row: Row, device: torch.device) -> dict[str, Any]:
    """What a record says of a row before it is measured."""
    ours = row.budget is not None
    depth = row.context if row.method == "compile" else group.shape.depth
    return {
        "suite": group.suite,
        "method": row.method,
        "label": row.label(),
        "model": group.shape.name,
        "parameters": group.shape.parameters(),
        "layers": depth,
        "full_depth": group.shape.full_depth,
        "dtype": str(group.dtype).removeprefix("torch."),
        "device": device.type,
        "batch": row.batch,
        "context": row.context,
        "budget": row.budget,
        "share": row.share,
        "slots": row.slots,
        "merge": row.merge if ours else None,
        "outline": row.outline,
        "note": group.note,
    }
