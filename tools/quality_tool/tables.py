"""The results as text: per model and measure, methods by budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quality_tool.records import Records

MEASURES = {
    "loss": "held-out loss of the continuation, nats per token",
    "loss_added": "loss added to the full cache's, nats per token",
    "loss_over_base": "loss over that of the first method with a budget, text by text, nats per token",
    "recall": "recall of planted facts asked for after compression",
    "agreement": "greedy tokens equal to the full cache's at the same place",
    "rouge_l": "ROUGE-L of the greedy continuation with the full cache's",
}
_NATS = ("loss", "loss_added", "loss_over_base")


def write(records: Records, path: Path) -> None:
    with path.open("w") as file:
        show(records, Console(file=file, width=150, color_system=None))


def show(records: Records, out: Console) -> None:
    for model in records.models():
        out.print(f"\n{model}", highlight=False)
        for name, value in records.conditions[model].items():
            out.print(f"  {name}: {value}", soft_wrap=True, highlight=False, markup=False)
        out.print("  in brackets: 95% bootstrap intervals over texts or recall prompts\n", markup=False)
        for measure, title in MEASURES.items():
            out.print(table(records, model, measure, title))


def table(records: Records, model: str, measure: str, title: str) -> Table:
    made = Table(title=f"{model}: {title}", title_justify="left")
    made.add_column("method", no_wrap=True)
    for share in records.shares():
        made.add_column(f"{share:.0%}", justify="right")
    for method in records.methods():
        cells = [records.find(model, method, share) for share in records.shares()]
        made.add_row(method, *(text(cell, measure) for cell in cells))
    return made


def text(cell: dict[str, Any] | None, measure: str) -> str:
    """`2.31 [2.20 2.43]`; a cell that could not be measured says why."""
    if cell is None:
        return ""
    if "why_not" in cell:
        return str(cell["why_not"])
    if cell[measure] is None:
        return ""
    figure, form = cell[measure], "{:.3f}" if measure in _NATS else "{:.1%}"
    mean, low, high = (form.format(figure[name]) for name in ("mean", "low", "high"))
    return f"{mean} \\[{low} {high}]"
