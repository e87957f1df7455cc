"""What the figures are for: ratios between records, and the goals they are held against.

A ratio with one of our kernels in it is told only while that kernel's check is green, and all but Table 1's totals
are between times of one run; those take prompts and steps from any runs on the same machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from zsmerge_compile.bench.machine import spread
from zsmerge_compile.bench.records import MEASURED, Record
from zsmerge_compile.bench.runs import Run, machines
from zsmerge_compile.bench.table1 import totals

RED = "op check red"
LONG = 54 * 1024  # tokens of the longest context in the paper's Figure 3
STEPS = ("decode", "figure3", "slots")


class Ratio(NamedTuple):
    """value: None while a check is red, and then `shown` says so. met: None where there is no goal.

    runs: the numbers of the runs that its times are from.
    """

    suite: str
    where: str
    what: str
    value: float | None
    shown: str
    goal: str | None = None
    met: bool | None = None
    runs: tuple[int, ...] = ()


class Goal(NamedTuple):
    """At least or at most `limit`."""

    limit: float
    least: bool

    def text(self, form: Callable[[float], str]) -> str:
        return f"{'>=' if self.least else '<='} {form(self.limit)}"

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit


def ratios(records: Iterable[Record], runs: Iterable[Run] = ()) -> list[Ratio]:
    """All of them, in the order of the suites; runs: what the records' numbers of runs mean."""
    measured = [record for record in records if record.status == MEASURED]
    rules = (_bandwidth, _faster, _against_plain, _flat, _prompts, _generate, _outline, _compile)
    return [*(ratio for rule in rules for ratio in rule(measured)), *_table1(measured, runs)]


def times(value: float) -> str:
    return f"{value:.2f}x"


def percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def whole(value: float) -> str:
    return f"{value:.0f}"


def _made(
    ours: Record, what: str, value: float, form: Callable[[float], str] = times, goal: Goal | None = None
) -> Ratio:
    red = ours.check == "red"
    shown, told = (RED, None) if red else (form(value), value)
    runs = () if ours.run is None else (ours.run,)
    if goal is None:
        return Ratio(ours.suite, where(ours), what, told, shown, runs=runs)
    return Ratio(ours.suite, where(ours), what, told, shown, goal.text(form), not red and goal.met(value), runs)


def where(record: Record) -> str:
    """The conditions a ratio holds for, as far as they differ between rows."""
    depth = "" if record.layers == record.full_depth else f" ({record.layers} layers)"
    parts = [f"{record.model}{depth}", f"batch {record.batch}"]
    if record.context:
        parts.append(f"{record.context:,} tokens")
    if record.budget is not None:
        parts.append(f"{record.slots:,} slots")
    return ", ".join(parts)


def _ms(record: Record) -> float:
    assert record.ms is not None
    return record.ms


def _place(record: Record) -> tuple[object, ...]:
    """What two rows must share to be compared, the run above all."""
    place = record.suite, record.model, record.layers, record.dtype, record.device, record.batch, record.note
    return record.run, *place


def _bandwidth(records: list[Record]) -> Iterator[Ratio]:
    for record in records:
        if record.device != "cuda" or record.share_of_floor is None or record.suite not in STEPS:
            continue
        whole = record.method == "zsmerge" and record.model == "llama-2-7b" and record.layers == record.full_depth
        if whole or (record.method == "op" and record.batch == 16 and record.slots >= 16_000):
            yield _made(record, "of copy bandwidth", record.share_of_floor, percent, Goal(0.85, least=True))


def _faster(records: list[Record]) -> Iterator[Ratio]:
    baselines = {(*_place(r), r.method, r.context): r for r in records if r.method in ("dynamic", "static")}
    for ours in records:
        if ours.method != "zsmerge" or ours.suite not in STEPS:
            continue
        headline = ours.suite == "figure3" and ours.context == LONG and ours.device == "cuda"
        for method, name in (("dynamic", "transformers' DynamicCache"), ("static", "compiled StaticCache")):
            base = baselines.get((*_place(ours), method, ours.context))
            if base is None:
                continue
            gain = _ms(base) / _ms(ours)
            goal = Goal(3.0, least=True) if headline and method == "dynamic" else None
            yield _made(ours, f"as fast as {name}", gain, goal=goal)
            if headline and method == "static":
                share = gain / _ideal(base, ours)
                yield _made(ours, "of the ideal byte ratio over it", share, percent, Goal(0.9, least=True))


def _ideal(base: Record, ours: Record) -> float:
    """What the bytes alone would give."""
    return ((base.weight_bytes or 0) + (base.cache_bytes or 0)) / ((ours.weight_bytes or 0) + (ours.cache_bytes or 0))


def beside_plain(records: Iterable[Record]) -> Iterator[tuple[Record, Record]]:
    """Ours, each with the plain attention of the same run and place and as many slots."""
    measured = [record for record in records if record.status == MEASURED]
    plain = {(*_place(r), r.method, r.budget): r for r in measured if r.method in ("plain", "op-plain")}
    for ours in measured:
        method = {"zsmerge": "plain", "policy": "plain", "op": "op-plain"}.get(ours.method)
        base = plain.get((*_place(ours), method, ours.budget))
        if base is not None:
            yield ours, base


def _against_plain(records: list[Record]) -> Iterator[Ratio]:
    for ours, base in beside_plain(records):
        if ours.policy is not None:
            unsure = ", op not checked" if ours.check == "not checked" else ""
            yield _made(ours, f"of plain attention's step: {ours.policy}{unsure}", _ms(ours) / _ms(base))
            continue
        limit = 1.10 if ours.device == "cuda" else 1.25 if ours.method == "zsmerge" else 1.5
        held = ours.device == "cuda" or ours.method == "zsmerge" or ours.slots >= 4096
        what = "of plain attention's step" if ours.method == "zsmerge" else "of plain attention, the op alone"
        yield _made(ours, what, _ms(ours) / _ms(base), goal=Goal(limit, least=False) if held else None)


def _flat(records: list[Record]) -> Iterator[Ratio]:
    groups: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    for record in records:
        if record.suite == "flat" and record.method == "zsmerge":
            groups[*_place(record), record.budget].append(record)
    for rows in groups.values():
        if len(rows) < 2:
            continue
        first = rows[0]
        goal = Goal(0.03 if first.device == "cuda" else 0.10, least=False)
        seen = [row.context for row in rows]
        what = f"from the median at most, {min(seen):,} to {max(seen):,} tokens seen"
        yield _made(first, what, spread([_ms(row) for row in rows]), percent, goal)
        sizes = {row.cache_bytes for row in rows}
        yield _made(
            first,
            "different sizes of the cache in bytes",
            len(sizes),
            lambda value: f"{value:.0f}",
            Goal(1, least=False),
        )


def _prompts(records: list[Record]) -> Iterator[Ratio]:
    theirs = {(*_place(r), r.context): r for r in records if r.method == "prompt"}
    chunked: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    for ours in records:
        base = theirs.get((*_place(ours), ours.context))
        if ours.method == "prompt-full" and base is not None and ours.suite == "prefill":
            goal = Goal(1.15, least=False) if ours.merge == "segment" else None
            yield _made(ours, f"of transformers' prefill, merge rule {ours.merge}", _ms(ours) / _ms(base), goal=goal)
        if ours.method == "prompt-chunked":
            chunked[*_place(ours), ours.budget].append(ours)
    for rows in chunked.values():
        rows.sort(key=lambda row: row.context)
        what = f"time per token of {rows[0].context:,} tokens, chunked (1: linear)"
        if len(rows) > 1:
            yield _made(rows[-1], what, _ms(rows[-1]) / _ms(rows[0]), goal=Goal(1.10, least=False))


def _generate(records: list[Record]) -> Iterator[Ratio]:
    loops = {(*_place(r), r.budget): r for r in records if r.method == "loop"}
    for record in records:
        base = loops.get((*_place(record), record.budget))
        if record.method == "generate" and base is not None:
            goal = Goal(1.05, least=False) if record.device == "cuda" else None
            yield _made(record, "of the bare decode loop", _ms(record) / _ms(base), goal=goal)


def _outline(records: list[Record]) -> Iterator[Ratio]:
    flat = {(*_place(r), r.budget): r for r in records if r.suite == "outline" and r.outline is False}
    for ours in records:
        base = flat.get((*_place(ours), ours.budget))
        if ours.outline and base is not None:
            yield _made(ours, "of the step of the graph compiled whole", _ms(ours) / _ms(base))


def _compile(records: list[Record]) -> Iterator[Ratio]:
    found = {(r.run, r.model, r.device, r.outline, r.layers): r for r in records if r.method == "compile"}
    for (run, model, device, outline, layers), deep in found.items():
        few = found.get((run, model, device, outline, 4))
        if layers == 4 or few is None or not few.seconds or not deep.seconds:
            continue
        how = "layers outlined" if outline else "whole graph"
        goal = Goal(2.0, least=False) if outline and layers == 32 else None
        made = _made(deep, f"{layers} layers : 4 layers, {how}", deep.seconds / few.seconds, goal=goal)
        yield made._replace(where=f"{model}, {device}")


def _table1(records: list[Record], runs: Iterable[Run]) -> Iterator[Ratio]:
    rows = totals(records, machines(runs))
    for row in rows:
        base = next((b for b in rows if b.place == row.place and b.method == "dynamic"), None)
        if row.method == "zsmerge" and base is not None:
            gain, red = row.tokens_per_s / base.tokens_per_s, row.check == "red"
            shown, value = (RED, None) if red else (times(gain), gain)
            both = tuple(sorted({*row.runs, *base.runs}))
            yield Ratio("table1", row.where, "throughput of DynamicCache's", value, shown, runs=both)
