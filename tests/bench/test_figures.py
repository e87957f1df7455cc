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
from zsmerge_compile.bench.report import conditions, tables
from zsmerge_compile.bench.runs import MACHINE, Run
from zsmerge_compile.bench.table1 import PAPER, integral, totals
from zsmerge_compile.errors import InputError

SCHEMA = [  # a reader of old files rests on these: only ever add
    "suite", "method", "label", "model", "parameters", "layers", "full_depth", "dtype", "device", "batch", "context",
    "budget", "share", "slots", "merge", "outline", "note", "status", "reason", "check", "check_text", "kernel", "ms",
    "ms_low", "ms_high", "rounds", "warmup", "seconds", "compile_seconds", "weight_bytes", "cache_bytes", "gb_per_s",
    "floor_ms", "share_of_floor", "tokens_per_s", "peak_bytes", "peak_of", "run", "policy", "slot_bytes",
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


def test_compile_ratios_of_16_and_32_layers_outlined_or_not() -> None:
    seconds = {(4, True): 5, (16, True): 6, (32, True): 9, (4, False): 5, (16, False): 10}
    rows = [record("compile", 0, suite="compile", layers=n, outline=how, seconds=s) for (n, how), s in seconds.items()]
    assert [(ratio.what, ratio.shown, ratio.met) for ratio in ratios(rows)] == [
        ("16 layers : 4 layers, layers outlined", "1.20x", None),
        ("32 layers : 4 layers, layers outlined", "1.80x", True),
        ("16 layers : 4 layers, whole graph", "2.00x", None),
    ]


@pytest.mark.parametrize(("device", "met"), [("cpu", None), ("cuda", False)])
def test_generate_has_a_goal_on_a_gpu(device: str, met: bool | None) -> None:
    rows = [record(method, ms, suite="generate", device=device) for method, ms in (("loop", 1.0), ("generate", 1.06))]
    assert [(ratio.shown, ratio.met) for ratio in ratios(rows)] == [("1.06x", met)]


def test_a_step_of_outlined_layers_is_held_against_the_whole_graph_s() -> None:
    outlined, whole = (
        record("zsmerge", ms, suite="outline", budget=12, outline=how) for how, ms in ((True, 1.02), (False, 1.0))
    )
    assert shown(outlined, whole) == {"of the step of the graph compiled whole": "1.02x"}


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


CPU = {**dict.fromkeys(MACHINE), "device": "CPU"}


def test_json_keeps_its_schema_and_reads_back(tmp_path: Path) -> None:
    results = Results.open(tmp_path / "r.json", "bench", CPU, append=False)
    row = record("zsmerge", 2.0, budget=12)
    results.add(record("dynamic", 6.0))
    results.add(row)
    results.add(replace(row, ms=3.0))  # measured again
    content = json.loads(results.path.read_text())
    assert list(content) == ["schema", "runs", "records", "ratios"]
    assert list(content["runs"][0]) == ["number", "command", "date", "conditions", "copy_gb_per_s"]
    assert list(content["records"][0]) == SCHEMA == list(asdict(row))
    assert list(content["ratios"][0]) == ["suite", "where", "what", "value", "shown", "goal", "met", "runs"]
    assert [r.ms for r in load(results.path).records] == [6.0, 3.0]
    assert len(tables(results)) == 2


def test_appended_records_keep_to_their_runs(tmp_path: Path) -> None:
    """Conditions and bandwidths of both runs stay; rows of different runs are not compared."""
    path = tmp_path / "r.json"
    for command, bandwidth, row in (("one", 10.0, record("dynamic", 6.0)), ("two", 20.0, record("zsmerge", budget=12))):
        results = Results.open(path, command, CPU, append=True)
        results.run.copy_gb_per_s = bandwidth
        results.add(row)
    found = load(path)
    assert [(run.number, run.command, run.copy_gb_per_s) for run in found.runs] == [(1, "one", 10.0), (2, "two", 20.0)]
    assert [(r.method, r.run) for r in found.records] == [("dynamic", 1), ("zsmerge", 2)]
    assert ratios(found.records, found.runs) == []
    told = "\n".join(conditions(found))
    assert "run 1: " in told and "copy GB/s: 10.0" in told and "run 2: " in told and "copy GB/s: 20.0" in told
    results.add(record("dynamic", 4.0))
    (ratio,) = ratios(results.records, results.runs)
    assert ratio.runs == (2,) and [run.number for run in load(path).runs] == [2], "nothing is left of the first run"


def test_a_row_that_is_skipped_later_stays_measured(tmp_path: Path) -> None:
    results = Results.open(tmp_path / "r.json", "bench", CPU, append=False)
    results.add(record("dynamic", 6.0))
    results.add(record("dynamic", None, status="skipped", reason="no time"))  # type: ignore[arg-type]
    assert [(r.status, r.ms) for r in results.records] == [("measured", 6.0)]


def test_table1_takes_prompts_from_another_run_on_the_same_machine_only() -> None:
    """--keep may measure steps and prompts in different runs."""
    rows = [replace(row, run=1 if row.method.startswith("prompt") else 2) for row in workload()]
    for device, count in (("CPU", 1), ("another", 0)):
        runs = [Run(1, "", "", {**CPU, "device": device}), Run(2, "", "", CPU)]
        found = ratios(rows, runs)
        assert [ratio.runs for ratio in found] == [(1, 2)] * count


def test_tables_tell_warm_up_and_what_the_peak_is() -> None:
    row = record("dynamic", warmup=3, rounds=15, peak_bytes=2**20, peak_of="resident memory of a call", run=1)
    told = conditions(Results(Path("r.json"), [Run(1, "bench", "now", CPU)], [row]))
    assert any(line.startswith("warm-up:") and "decode 3 + 15" in line for line in told)
    assert "peak: resident memory of a call" in told


def test_a_damaged_or_old_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text in ("{", "[]", '{"schema": 99, "records": []}'):
        path.write_text(text)
        with pytest.raises(InputError):
            load(path)
    path.write_text('{"schema": 1, "conditions": {}, "copy_gb_per_s": 1.0, "records": []}')
    with pytest.raises(InputError, match=r"schema of .*r.json must be 2, got 1; a run that doesn't add"):
        Results.open(path, "bench", CPU, append=True)
    assert Results.open(path, "bench", CPU, append=False).records == []
