"""What is made of measured times: medians, Table 1's integral, ratios, the file's schema."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsmerge_compile.bench import timing
from zsmerge_compile.bench.ratios import RED, ratios
from zsmerge_compile.bench.records import Record, Results, load
from zsmerge_compile.bench.report import tables
from zsmerge_compile.bench.table1 import PAPER, integral, totals
from zsmerge_compile.errors import InputError

SCHEMA = [  # a reader of old files rests on these: only ever add
    "suite", "method", "label", "model", "parameters", "layers", "full_depth", "dtype", "device", "batch", "context",
    "budget", "share", "slots", "merge", "outline", "note", "status", "reason", "check", "check_text", "kernel", "ms",
    "ms_low", "ms_high", "rounds", "warmup", "seconds", "compile_seconds", "weight_bytes", "cache_bytes", "gb_per_s",
    "floor_ms", "share_of_floor", "tokens_per_s", "peak_bytes",
]  # fmt: skip


def record(method: str, ms: float = 1.0, **changes: object) -> Record:
    """A measured row."""
    given: dict[str, object] = dict.fromkeys((field.name for field in fields(Record)), None)
    given |= {"suite": "decode", "method": method, "label": method, "model": "tiny", "layers": 2, "full_depth": 2}
    given |= {"parameters": 1, "dtype": "float32", "device": "cpu", "batch": 1, "context": 128, "slots": 128}
    given |= {"note": "", "status": "measured", "ms": ms, "ms_low": ms, "ms_high": ms, "weight_bytes": 1000}
    given |= {"cache_bytes": 1000}
    return Record(**{**given, **changes})  # type: ignore[arg-type]


def shown(*records: Record) -> dict[str, str]:
    return {ratio.what: ratio.shown for ratio in ratios(records)}


@given(
    start=st.integers(1, 10_000),
    new=st.integers(4, 10_000),
    base=st.floats(0.1, 100),
    slope=st.floats(0, 0.1),
    samples=st.integers(2, 9),
)
def test_integral_of_a_linear_curve_is_the_sum_of_its_steps(
    start: int, new: int, base: float, slope: float, samples: int
) -> None:
    samples = min(samples, new + 1)
    lengths = [start + new * i // (samples - 1) for i in range(samples)]
    seconds = integral(lengths, [base + slope * length for length in lengths])
    steps = sum(base + slope * length for length in range(start, start + new)) / 1e3
    assert seconds == pytest.approx(steps, rel=1e-9)


def test_summary_takes_the_median_and_the_runs_around_it() -> None:
    assert timing.summary([1.0, 1.0, 9.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0]) == (2.0, 1.0, 3.0, 9)
    assert timing.summary([5.0]) == (5.0, 5.0, 5.0, 1)


def test_ratios_compare_rows_of_the_same_place_only() -> None:
    ours = record("zsmerge", 2.0, budget=12, slots=13, check="green")
    assert shown(ours, record("dynamic", 6.0)) == {"as fast as transformers' DynamicCache": "3.00x"}
    assert shown(ours, record("dynamic", 6.0, batch=2), record("static", 6.0, context=64)) == {}


def test_no_ratio_is_told_while_the_check_is_red() -> None:
    ours = record("zsmerge", 2.0, budget=12, slots=13, check="red", suite="slots")
    (ratio,) = ratios([ours, record("plain", 1.0, budget=12, slots=13, suite="slots")])
    assert (ratio.value, ratio.shown, ratio.met) == (None, RED, False)


def test_goals() -> None:
    rows = [record("zsmerge", ms, suite="flat", context=seen, budget=12) for seen, ms in ((1, 1.0), (2, 1.05), (3, 1))]
    assert [ratio.met for ratio in ratios(rows)] == [True, True]
    assert [ratio.met for ratio in ratios([*rows, record("zsmerge", 1.2, suite="flat", budget=12)])] == [False, True]
    compiling = [record("compile", 0, suite="compile", layers=n, outline=True, seconds=s) for n, s in ((4, 5), (32, 9))]
    assert [(ratio.shown, ratio.met) for ratio in ratios(compiling)] == [("1.80x", True)]


def test_prompts_are_held_against_transformers_prefill() -> None:
    theirs = record("prompt", 1.0, suite="prefill")
    segment, sequential = (
        record("prompt-full", ms, suite="prefill", budget=12, merge=merge)
        for merge, ms in (("segment", 1.1), ("sequential", 2.0))
    )
    assert [(r.shown, r.met) for r in ratios([theirs, segment, sequential])] == [("1.10x", True), ("2.00x", None)]


def workload(check: str = "green") -> list[Record]:
    work, rows = PAPER[0], []
    place = {"suite": "table1", "model": work.model, "batch": work.batch, "note": work.name}
    for length in work.lengths():
        rows.append(record("dynamic", length / 100, context=length, **place))
        rows.append(record("zsmerge", 20.0, context=length, budget=205, check=check, **place))
    return [
        *rows,
        record("prompt", 1.0, context=work.prompt, **place),
        record("prompt-full", 1.0, context=work.prompt, budget=205, check=check, **place),
    ]


def test_table1_totals() -> None:
    found = {total.method: total for total in totals(workload())}
    ours, theirs = found["zsmerge"], found["dynamic"]
    assert ours.latency_s == pytest.approx(4096 * 20e-3 + 4.096)
    assert theirs.decode_s == pytest.approx(sum(length / 100 for length in range(4096, 8192)) / 1e3)
    assert ours.tokens_per_s == pytest.approx(4 * 4096 / ours.latency_s)
    assert ratios(workload("red"))[-1].shown == RED
    assert totals(workload()[2:]) == [], "a length is missing"


def test_json_keeps_its_schema_and_reads_back(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", {"device": "CPU"}, 1.0, [])
    row = record("zsmerge", 2.0, budget=12)
    results.add(record("dynamic", 6.0))
    results.add(row)
    results.add(replace(row, ms=3.0))  # measured again
    content = json.loads(results.path.read_text())
    assert list(content) == ["schema", "conditions", "copy_gb_per_s", "records", "ratios"]
    assert list(content["records"][0]) == SCHEMA == list(asdict(row))
    assert list(content["ratios"][0]) == ["suite", "where", "what", "value", "shown", "goal", "met"]
    assert [r.ms for r in load(results.path).records] == [6.0, 3.0]
    assert len(tables(results)) == 2


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text in ("{", "[]", '{"schema": 99, "records": []}'):
        path.write_text(text)
        with pytest.raises(InputError):
            load(path)
