"""One measured (or skipped) row, and the JSON file that grows by one after each, over as many runs as it takes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from zsmerge_compile.bench.runs import Run, started
from zsmerge_compile.errors import InputError, must

SCHEMA = 2
MEASURED, SKIPPED, FAILED = "measured", "skipped", "failed"


@dataclass(frozen=True)
class Record:
    """A row and its figures; None where one does not apply or was not measured.

    ms             median milliseconds per token (of prompts, per prompt token; of ops, per call)
    ms_low/high    lowest and highest median among the runs
    seconds        compile rows: what zs.compile took
    floor_ms       (weight_bytes + cache_bytes) over the copy bandwidth of the record's own run
    peak_bytes     memory at its highest during a call; of which memory, and what it holds: `peak_of`
    policy         policy rows: which, as --policies has it
    slot_bytes     policy rows and plain ones: bytes of state per row, key/value head, layer and slot
    run            the number of the run it was measured or given up in; None in a blank table
    status         measured, skipped or failed; `reason` says why not measured
    check          whether the kernels it ran equal ops.reference ("green", "red", "not checked"), None: nothing of
                   ours in it
    """

    suite: str
    method: str
    label: str
    model: str
    parameters: int
    layers: int
    full_depth: int
    dtype: str
    device: str
    batch: int
    context: int
    budget: int | None
    share: float | None
    slots: int
    merge: str | None
    outline: bool | None
    note: str
    status: str
    reason: str | None = None
    check: str | None = None
    check_text: str | None = None
    kernel: str | None = None
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    rounds: int | None = None
    warmup: int | None = None
    seconds: float | None = None
    compile_seconds: float | None = None
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    gb_per_s: float | None = None
    floor_ms: float | None = None
    share_of_floor: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    peak_of: str | None = None
    run: int | None = None
    policy: str | None = None
    slot_bytes: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a row the same row in a later run."""
        place = (self.suite, self.method, self.model, self.layers, self.dtype, self.device)
        return (*place, self.batch, self.context, self.budget, self.merge, self.outline, self.note, self.policy)


@dataclass
class Results:
    """The file: runs, records and what follows from them; saved whole after each record."""

    path: Path
    runs: list[Run]
    records: list[Record]

    @classmethod
    def open(cls, path: Path, command: str, conditions: dict[str, Any], append: bool) -> Results:
        """A new file, or one to which a run's records are added; raises InputError where an old one cannot be read."""
        old = load(path) if append and path.exists() else cls(path, [], [])
        return cls(path, [*old.runs, started(old.runs, command, conditions)], old.records)

    @property
    def run(self) -> Run:
        """The latest, in which records are being added."""
        return self.runs[-1]

    def add(self, record: Record) -> None:
        """Takes the place of an earlier record of the same row; a skipped row never that of a measured one."""
        place = {old.key: index for index, old in enumerate(self.records)}.get(record.key, len(self.records))
        if record.status == SKIPPED and any(old.status == MEASURED for old in self.records[place : place + 1]):
            return
        self.records[place : place + 1] = [replace(record, run=self.run.number)]
        self.save()

    def save(self) -> None:
        """Write the file, never half of it. Runs of which no record is left are dropped, the latest excepted."""
        from zsmerge_compile.bench.ratios import ratios

        named = {record.run for record in self.records}
        runs = [run for run in self.runs if run.number in named or run is self.runs[-1]]
        content = {
            "schema": SCHEMA,
            "runs": [asdict(run) for run in runs],
            "records": [asdict(record) for record in self.records],
            "ratios": [ratio._asdict() for ratio in ratios(self.records, runs)],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".json.part")
        fresh.write_text(_json(content), encoding="utf-8")
        os.replace(fresh, self.path)


def _json(content: dict[str, Any]) -> str:
    """JSON with a line for each run, record and ratio."""
    parts = []
    for name, value in content.items():
        lines = [json.dumps(row) for row in value] if isinstance(value, list) else []
        text = "[\n  " + ",\n  ".join(lines) + "\n ]" if lines else json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def load(path: Path) -> Results:
    """A file's content; raises InputError where it is none of ours, or of another schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            hint = "a run that doesn't add to it writes a new one"
            raise InputError(must(f"schema of {path}", SCHEMA, content["schema"], hint))
        runs = [Run(**run) for run in content["runs"]]
        names = {field.name for field in fields(Record)}
        rows = [{name: value for name, value in row.items() if name in names} for row in content["records"]]
        return Results(path, runs, [Record(**row) for row in rows])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise InputError(must(str(path), "results that tools/bench wrote", got)) from error


def red(records: Iterable[Record]) -> list[Record]:
    """Records whose kernels compute something else than the specification."""
    return [record for record in records if record.check == "red"]
