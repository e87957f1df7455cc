"""The results file: written after every cell, so that a cut-off run loses little, and read by tables and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.model import FAMILIES

SCHEMA = 2


class Records:
    """conditions: model -> what its figures hold for; cells: one per model, method and share; survivors: positions
    kept; presses: kvpress's versions and settings. Models that a run leaves out keep what an earlier run found, and so
    do the other methods of a model where a run names its methods or policies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.conditions: dict[str, dict[str, Any]] = {}
        self.cells: list[dict[str, Any]] = []
        self.survivors: list[dict[str, Any]] = []
        self.presses: dict[str, Any] = {}

    def begin(self, model: str, conditions: dict[str, Any], keep: bool = False) -> None:
        """Forgets what an earlier run found of this model; or keeps it, to add cells found under the same conditions.

        SystemExit where they are others, the command aside.
        """
        old = self.conditions.get(model)
        if keep and old is not None:
            others = [name for name in {**old, **conditions} if old.get(name) != conditions.get(name)]
            others = [name for name in others if name != "command"]
            if others:
                told = f"{model}'s conditions in {self.path} must be those of this run, which adds to them"
                raise SystemExit(f"{told}, got other {', '.join(others)}; name another --out")
            commands = dict.fromkeys([*old["command"].split("; "), conditions["command"]])
            self.conditions[model] = conditions | {"command": "; ".join(commands)}
            return
        self.conditions[model] = conditions
        self.cells = [cell for cell in self.cells if cell["model"] != model]
        self.survivors = [entry for entry in self.survivors if entry["model"] != model]

    def add(self, **cell: Any) -> None:
        """Takes the place of an earlier cell of the same model, method and share."""
        keys = [(old["model"], old["method"], old["share"]) for old in self.cells]
        key = cell["model"], cell["method"], cell["share"]
        place = keys.index(key) if key in keys else len(keys)
        self.cells[place : place + 1] = [cell]
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
