"""The results file: written after every cell, so that a cut-off run loses little, and read by tables and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.model import FAMILIES

SCHEMA = 2


class Records:
    """conditions: model -> what its figures hold for; cells: one per model, method and share; survivors: positions
    kept; presses: kvpress's versions and settings. Models that a run leaves out keep what an earlier run found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.conditions: dict[str, dict[str, Any]] = {}
        self.cells: list[dict[str, Any]] = []
        self.survivors: list[dict[str, Any]] = []
        self.presses: dict[str, Any] = {}

    def begin(self, model: str, conditions: dict[str, Any]) -> None:
        """Forgets what an earlier run found of this model."""
        self.conditions[model] = conditions
        self.cells = [cell for cell in self.cells if cell["model"] != model]
        self.survivors = [entry for entry in self.survivors if entry["model"] != model]

    def add(self, **cell: Any) -> None:
        self.cells.append(cell)
        self.write()

    def write(self) -> None:
        fields = ("conditions", "cells", "survivors", "presses")
        whole = {"schema": SCHEMA} | {name: getattr(self, name) for name in fields}
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(whole, indent=1) + "\n")
        draft.replace(self.path)

    @classmethod
    def read(cls, path: Path) -> Records:
        raw = json.loads(path.read_text())
        if raw.get("schema") != SCHEMA:
            got = f"got {raw.get('schema')} in {path}; name another --out"
            raise SystemExit(f"results must be of schema {SCHEMA}, {got}")
        records = cls(path)
        for name in ("conditions", "cells", "survivors", "presses"):
            setattr(records, name, raw[name])
        return records

    def models(self) -> list[str]:
        return sorted({cell["model"] for cell in self.cells}, key=list(FAMILIES).index)

    def methods(self) -> list[str]:
        return list(dict.fromkeys(cell["method"] for cell in self.cells))

    def shares(self) -> list[float]:
        return sorted({cell["share"] for cell in self.cells if cell["share"] is not None}, reverse=True)

    def find(self, model: str, method: str, share: float | None) -> dict[str, Any] | None:
        """The cell, a method without budgets (the full cache) standing for all shares."""
        fitting = (c for c in self.cells if (c["model"], c["method"]) == (model, method))
        return next((cell for cell in fitting if cell["share"] in (share, None)), None)
