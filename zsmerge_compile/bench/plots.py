"""The records as pictures: one PNG, a plot per suite and model."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zsmerge_compile.bench.records import MEASURED, Record
from zsmerge_compile.bench.rows import METHODS

# suite -> the field along x and its name
ACROSS = {
    "slots": ("slots", "slots per key/value head"),
    "figure3": ("context", "tokens"),
    "decode": ("context", "tokens"),
    "flat": ("context", "tokens seen"),
    "prefill": ("context", "prompt tokens"),
    "policies": ("slots", "slots per key/value head"),
    "table1": ("context", "tokens"),
    "compile": ("layers", "layers"),
}
WIDE = 3  # plots abreast


def installed() -> bool:
    """Whether there is matplotlib."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(records: Iterable[Record], path: Path) -> bool:
    """Write the picture; False where there is nothing to draw. matplotlib must be installed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plots = _plots(records)
    if not plots:
        return False
    deep = -(-len(plots) // WIDE)
    figure = Figure(figsize=(6 * min(WIDE, len(plots)), 4.2 * deep), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(deep, min(WIDE, len(plots)), squeeze=False).ravel()
    for axis, ((suite, title), lines) in zip(axes, plots.items(), strict=False):
        _draw_one(axis, suite, title, lines)
    for axis in axes[len(plots) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    return True


Lines = dict[str, list[tuple[float, float]]]


def _plots(records: Iterable[Record]) -> dict[tuple[str, str], Lines]:
    """(suite, title) -> line -> points."""
    plots: dict[tuple[str, str], Lines] = defaultdict(lambda: defaultdict(list))
    for record in records:
        y = record.seconds if record.suite == "compile" else record.ms
        if record.status != MEASURED or record.suite not in ACROSS or y is None:
            continue
        alone = ", op alone" if record.method.startswith("op") else ""
        whole = alone or record.suite == "compile" or record.layers == record.full_depth
        depth = "" if whole else f", {record.layers} layers"
        title = f"{record.suite}{alone}: {record.model}{depth}, batch {record.batch} {record.note}".strip()
        plots[record.suite, title][_line(record)].append((getattr(record, ACROSS[record.suite][0]), y))
    return {key: dict(lines) for key, lines in plots.items()}


def _line(record: Record) -> str:
    if record.suite == "compile":
        return "layers outlined" if record.outline else "whole graph"
    name = record.policy or METHODS[record.method]
    if record.method.startswith("prompt-full"):
        return f"{name}, {record.merge}"
    if record.method == "zsmerge" and record.suite != "slots":
        return f"{name}, " + (f"{record.share:.0%}" if record.share else f"{record.slots:,} slots")
    return name


def _draw_one(axis: Any, suite: str, title: str, lines: Lines) -> None:
    for name, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    places = sorted({x for points in lines.values() for x, _ in points})
    axis.set_xscale("log", base=2)  # contexts and budgets go up by factors
    axis.set_xticks(places, [_thousands(place) for place in places])
    axis.minorticks_off()
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(ACROSS[suite][1])
    axis.set_ylabel("seconds" if suite == "compile" else "ms per token")
    axis.set_ylim(0, 1.2 * max(y for points in lines.values() for _, y in points))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _thousands(count: float) -> str:
    return f"{count / 1024:.0f}k" if count >= 1024 else f"{count:.0f}"
