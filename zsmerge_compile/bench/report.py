"""Records as tables for people: a table per suite, the ratios with their goals, the conditions they hold for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from zsmerge_compile.bench.ratios import Ratio, percent, ratios
from zsmerge_compile.bench.records import MEASURED, Record, Results, red
from zsmerge_compile.bench.runs import machines
from zsmerge_compile.bench.table1 import PAPER, SAMPLES, totals

TITLES = {
    "slots": "the same compiled model, and its attention op alone, against plain attention over as many slots",
    "figure3": "the paper's Figure 3: LLaMA-2-7B, batch 1, budget 18k",
    "decode": "decode step, transformers' caches and ours",
    "flat": "decode step at one budget, more and more tokens seen",
    "prefill": "prompts (ms per prompt token)",
    "generate": "greedy generate() beside the bare loop (ms per new token, prompt of 32 tokens included)",
    "policies": "decode step by cache policy, beside plain attention over as many slots",
    "table1": "the paper's Table 1: step times by length",
    "outline": "decode step, alike layers compiled once and called beside the whole graph compiled at once",
    "compile": "zs.compile from an empty compiler cache, by depth",
}
NOTES = (
    "Caches were filled with random content instead of being prefilled (suite policies: by prompts and steps of random "
    "tokens); weights are random. ms per token: median of interleaved blocks; in brackets the lowest and highest "
    "median of thirds of them. Floor: weights + cache bytes over the copy bandwidth measured in the row's own run. "
    "k = 1,024."
)


def tables(results: Results) -> list[Table]:
    """Every table of the results, in the order of the suites."""
    found = [_rows(suite, _of(results.records, suite)) for suite in TITLES if _of(results.records, suite)]
    if any(record.suite == "table1" for record in results.records):
        found.append(_table1(results.records, machines(results.runs)))
    made = ratios(results.records, results.runs)
    return [*found, ratios_table(made)] if made else found


def write_text(results: Results, path: Path, width: int = 190) -> None:
    """The tables, remarks and conditions as a text file."""
    with path.open("w", encoding="utf-8") as file:
        show(results, Console(file=file, width=width, highlight=False))


def show(results: Results, out: Console) -> None:
    """Print everything."""
    for table in tables(results):
        out.print(table)
    for record in {record.check_text: record for record in red(results.records)}.values():
        text = f"op check red, no ratio is told: {record.check_text}"
        out.print(text, markup=False, style="bold red", soft_wrap=True)
    out.print(NOTES, soft_wrap=True)
    for line in conditions(results):
        out.print(line, markup=False, soft_wrap=True)


def conditions(results: Results) -> list[str]:
    """How often rows ran, what "peak" means, and every run of which a row is shown: command, machine, versions."""
    measured = [record for record in results.records if record.status == MEASURED]
    lines = [f"peak: {text}" for text in dict.fromkeys(r.peak_of for r in measured) if text]
    plans = dict.fromkeys((r.suite, r.warmup, r.rounds) for r in measured if r.warmup is not None)
    if plans:
        told = ", ".join(f"{suite} {warmup} + {rounds}" for suite, warmup, rounds in plans)
        lines.append(f"warm-up: two calls of each row, then rounds untimed + timed: {told}")
    shown = {record.run for record in results.records}
    for run in results.runs:
        if run.number in shown:
            figures = {**run.conditions, "copy GB/s": run.copy_gb_per_s}
            lines.append(f"run {run.number}: {run.date}, {run.command}")
            lines.append("    " + "; ".join(f"{name}: {_plain(value)}" for name, value in figures.items()))
    return lines


def _plain(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _of(records: Iterable[Record], suite: str) -> list[Record]:
    return [record for record in records if record.suite == suite]


def _rows(suite: str, records: list[Record]) -> Table:
    table = Table(title=f"{suite}: {TITLES[suite]}", title_justify="left", box=SIMPLE_HEAD)
    for name in ("model", "batch", "tokens", "row"):
        table.add_column(name, justify="right" if name in ("batch", "tokens") else "left")
    last = "seconds" if suite == "compile" else "ms / token"
    more = ["bytes / slot"] if suite == "policies" else []
    for name in (last, "GB/s", "floor ms", "of floor", "cache", "peak", "op check", *more, "run"):
        table.add_column(name, justify="right")
    last_place: object = None
    by_slots = suite in ("slots", "policies")
    if by_slots:  # the op beside the model it is in
        records = sorted(records, key=lambda record: (record.model, record.batch, record.slots))
    for record in records:
        place = (record.model, record.batch, record.slots if by_slots else record.layers, record.note)
        if last_place not in (None, place):
            table.add_section()
        last_place = place
        depth = f"{record.layers} of {record.full_depth} layers" if record.layers != record.full_depth else ""
        per_slot = [_bytes(record)] if suite == "policies" else []
        model = ", ".join(filter(None, (record.model, depth, record.dtype, record.note)))
        table.add_row(
            model, str(record.batch), f"{record.context:,}", record.label, *_figures(record), *per_slot, _run(record)
        )
    return table


def _figures(record: Record) -> tuple[str, ...]:
    if record.status != MEASURED:
        return (record.reason or record.status, *[""] * 6)
    if record.seconds is not None:
        return (f"{record.seconds:.1f}", *[""] * 6)
    assert record.ms is not None and record.ms_low is not None and record.ms_high is not None
    return (
        f"{_ms(record.ms)} ({_ms(record.ms_low)}-{_ms(record.ms_high)})",
        "" if record.gb_per_s is None else f"{record.gb_per_s:,.0f}",
        "" if record.floor_ms is None else _ms(record.floor_ms),
        "" if record.share_of_floor is None else percent(record.share_of_floor),
        _size(record.cache_bytes),
        _size(record.peak_bytes),
        record.check or "",
    )


def _bytes(record: Record) -> str:
    return "" if record.slot_bytes is None else f"{record.slot_bytes:,.0f}"


def _run(record: Record) -> str:
    return "" if record.status != MEASURED or record.run is None else str(record.run)


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _size(value: int | None) -> str:
    if not value:
        return ""
    return f"{value / 2**20:,.0f} MiB" if value < 10 * 2**30 else f"{value / 2**30:,.1f} GiB"


def _table1(records: list[Record], machines: Mapping[int, object]) -> Table:
    title = (
        f"table1: latency and throughput, prefill measured once, decode integrated (trapezoid rule) from step times "
        f"sampled at {SAMPLES} lengths; DynamicCache's prefill stands for StaticCache's too"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("workload", "row", "prefill s", "latency s", "tokens / s", "the paper (A800, tokens / s)", "runs"):
        table.add_column(name, justify="left" if name in ("workload", "row") else "right")
    found = totals(records, machines)
    for work in PAPER:
        place = f"{work.model}, {work.prompt} + {work.new} tokens, batch {work.batch}"
        for method, paper in (("dynamic", work.paper_full), ("static", None), ("zsmerge", work.paper_zsmerge)):
            total = next((t for t in found if t.where == place and t.method == method), None)
            paper_text = "OOM" if method == "dynamic" and paper is None else "" if paper is None else f"{paper:.1f}"
            if total is None:
                table.add_row(place, method, "", "", _why(records, work.name, work.batch, method), paper_text)
                continue
            figures = (f"{total.prefill_s:.2f}", f"{total.latency_s:.1f}", f"{total.tokens_per_s:.1f}")
            table.add_row(place, total.label, *figures, paper_text, _numbers(total.runs))
    return table


def _why(records: Iterable[Record], note: str, batch: int, method: str) -> str:
    mine = [r for r in _of(records, "table1") if (r.note, r.batch) == (note, batch) and r.status != MEASURED]
    steps = [r for r in mine if r.method in (method, "prompt" if method != "zsmerge" else "prompt-full")]
    return next((r.reason or r.status for r in reversed(steps)), "not measured")


def ratios_table(made: list[Ratio]) -> Table:
    """What the figures come to, beside the goals."""
    table = Table(title="ratios and goals", title_justify="left", box=SIMPLE_HEAD)
    for name in ("suite", "where", "figure", "what", "goal", "met", "run"):
        table.add_column(name, justify="right" if name == "figure" else "left")
    for ratio in made:
        met = "" if ratio.met is None else "yes" if ratio.met else "NO"
        table.add_row(ratio.suite, ratio.where, ratio.shown, ratio.what, ratio.goal or "", met, _numbers(ratio.runs))
    return table


def _numbers(runs: Iterable[int]) -> str:
    return ", ".join(str(number) for number in runs)
