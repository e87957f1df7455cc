"""The results as pictures: loss against budget, recall by planted depth, and which tokens survive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from quality_tool.methods import FULL_CACHE, is_policy
from quality_tool.records import Records


def draw(records: Records, path: Path) -> list[Path]:
    """One PNG a subject, beside the results: `path` names them."""
    pictures = {"loss": _losses(records), "recall": _recalls(records)}
    if records.survivors:
        pictures["survivors"] = _survivors(records)
    made = []
    for name, figure in pictures.items():
        FigureCanvasAgg(figure)
        made.append(path.with_name(f"{path.stem}_{name}.png"))
        figure.savefig(made[-1], dpi=110)
    return made


def _losses(records: Records) -> Figure:
    models = records.models()
    figure = Figure(figsize=(6 * len(models), 4.6), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        axis.set_prop_cycle(color=colormaps["tab20"].colors)  # more methods than the usual ten colours
        for method in records.methods():
            found = [(share, records.find(model, method, share)) for share in records.shares()]
            points = [(share, cell["loss"]["mean"]) for share, cell in found if cell and "loss" in cell]
            if points:
                style = "--" if "Press" in method else ":" if is_policy(method) else "-"
                axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=method)
        axis.set_xscale("log")
        axis.set_xticks(records.shares(), [f"{share:.0%}" for share in records.shares()])
        axis.minorticks_off()
        axis.set_title(f"{model}: held-out loss (nats per token)", fontsize=9)
        axis.set_xlabel("budget, share of the prompt")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    return figure


def _recalls(records: Records) -> Figure:
    """A heat map per model: rows are methods and budgets, columns parts of the context."""
    models, shares = records.models(), [share for share in records.shares() if share < 1]
    methods = [method for method in records.methods() if method != FULL_CACHE]
    figure = Figure(figsize=(5 * len(models) + 2, 0.2 * len(methods) * len(shares) + 1.5), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        rows = [
            (f"{method}, {share:.0%}", cell["recall_by_depth"])
            for method in methods
            for share in shares
            if (cell := records.find(model, method, share)) and "recall_by_depth" in cell
        ]
        if not rows:
            axis.set_axis_off()
            continue
        names, values = zip(*rows, strict=True)
        axis.imshow(np.array(values, dtype=float), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_yticks(range(len(names)), names, fontsize=5)
        axis.set_xticks([0, len(values[0]) - 1], ["oldest", "newest"], fontsize=7)
        axis.set_title(f"{model}: recall by planted depth", fontsize=9)
    return figure


def _survivors(records: Records) -> Figure:
    """Per model and method: one line per key/value head and layer, one column per token of the prompt."""
    models = list(dict.fromkeys(entry["model"] for entry in records.survivors))
    methods = list(dict.fromkeys(entry["method"] for entry in records.survivors))
    figure = Figure(figsize=(5 * len(models), 1.5 * len(methods)), layout="constrained")
    axes = figure.subplots(len(methods), len(models), squeeze=False)
    for entry in records.survivors:
        axis = axes[methods.index(entry["method"])][models.index(entry["model"])]
        axis.imshow(_kept(entry), cmap="Greys", aspect="auto", interpolation="nearest")
        axis.set_title(f"{entry['model']}: {entry['method']}, {entry['share']:.0%}", fontsize=8)
        axis.set_yticks([])
        axis.tick_params(labelsize=6)
    return figure


def _kept(entry: dict[str, Any]) -> Any:
    kept = np.zeros((len(entry["kept"]), entry["tokens"]))
    for row, positions in enumerate(entry["kept"]):
        kept[row, positions] = 1
    return kept
