"""tools/gpu_check: what it says without a GPU, that a step can lose only itself, what fits into its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_check, steps
from benchmarks.estimates import GPU, Machine, groups, seconds_left
from benchmarks.tasks import MINUTES, SUITES, TASKS, Task, limit

from zsmerge_compile.bench import presets
from zsmerge_compile.bench.records import Record, Results, load
from zsmerge_compile.bench.runs import MACHINE, Run, machine

ROOT = Path(__file__).resolve().parents[2]
H100 = {**dict.fromkeys(MACHINE), "device": "NVIDIA H100", "memory_bytes": 80 * 2**30}
HERE = Machine(machine(H100), 74 * 2**30)
OP = next(task for task in TASKS if task.name == "op-16k")


def results(tasks: Sequence[Task], reason: str | None = None) -> Results:
    """All rows of some steps, measured on an H100, or why not."""
    made = [
        Record(**group.facts(row, GPU), status="failed" if reason else "measured", reason=reason, ms=1.0, run=1)
        for task in tasks
        for group in groups(task)
        for row in group.rows
    ]
    return Results(Path("r.json"), [Run(1, "", "", H100)], made)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OUT": str(tmp_path)}
    run = subprocess.run([ROOT / "tools" / "gpu_check"], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: this machine must have a GPU") and run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_step_fits_alone_and_together_they_are_the_table() -> None:
    """A step that needs more than all the time there is would never run."""
    names = [task.name for task in TASKS]
    assert names[:3] == ["tests", "op-16k", "figure3"] and len(set(names)) == len(names)
    empty = Results(Path("r.json"), [], [])
    for task in TASKS:
        expected = seconds_left(task, empty, HERE)
        assert 0 < expected < 60 * MINUTES / 2 and limit(expected, MINUTES) > expected, task
        assert limit(expected, 2 * MINUTES) == 2 * limit(expected, MINUTES), "more time for all, more for each"
    each = {Record(**g.facts(r, GPU), status="").key for task in TASKS for g in groups(task) for r in g.rows}
    table = presets.groups(SUITES, presets.Choice(gpu=True))
    assert each == {Record(**group.facts(row, GPU), status="").key for group in table for row in group.rows}
    assert set(SUITES) == set(presets.SUITES)


def test_the_most_valuable_steps_fit_into_the_default_time() -> None:
    empty, left, run = Results(Path("r.json"), [], []), 60 * MINUTES, []
    for task in TASKS:
        expected = seconds_left(task, empty, HERE)
        if expected <= left:
            left -= expected
            run.append(task.name)
    assert run[:6] == ["tests", "op-16k", "figure3", "slots-16k-1", "generate", "slots-16k-16"]


def test_what_was_measured_here_is_not_measured_again() -> None:
    done = results([OP])
    assert seconds_left(OP, done, HERE) == 0.0 and seconds_left(TASKS[0], done, HERE) == 0.0
    assert seconds_left(TASKS[2], done, HERE) > 0
    elsewhere = Machine(machine({**H100, "device": "NVIDIA A100"}), HERE.memory)
    assert seconds_left(OP, done, elsewhere) > 0 and seconds_left(TASKS[0], done, elsewhere) > 0
    part = Results(done.path, done.runs, done.records[:2])
    assert 0 < seconds_left(OP, part, HERE) < seconds_left(OP, Results(done.path, [], []), HERE)
    assert seconds_left(OP, results([OP], "out of memory (estimated 9 GiB)"), HERE) == 0.0
    assert seconds_left(OP, results([OP], "RuntimeError: crashed"), HERE) > 0


def test_a_bench_has_time_for_what_is_expected_of_it(tmp_path: Path) -> None:
    """Its own clock starts after its imports, and its groups must end before it is stopped."""
    ((name, given),) = steps.commands(OP, tmp_path, 100.0).items()
    assert name == "gpu_check.log" and {"--append", "--missing"} <= set(given)
    assert 60 * float(given[given.index("--minutes") + 1]) == pytest.approx(90.0)
    measuring = sum(group.seconds(GPU) for group in groups(OP))
    ((_, given),) = steps.commands(OP, tmp_path, seconds_left(OP, Results(Path(), [], []), HERE)).items()
    assert 60 * float(given[given.index("--minutes") + 1]) >= measuring + 5


def test_the_triton_tests_run_whole_and_shared_out(tmp_path: Path) -> None:
    """Compiled, where there is a GPU: those that bear no mark, too."""
    marked, *shares = steps.commands(TASKS[0], tmp_path, 60.0).values()
    assert marked[-1] == "tests" and marked[marked.index("gpu") - 1] == "-m" and "--ignore=tests/ops/triton" in marked
    assert len(shares) == steps.SHARES
    for command in shares:
        assert command[-3:] == ["-m", "not slow", "tests/ops/triton"]
    found: list[str] = []
    (tmp_path / "test_x.py").write_text("import pytest\n@pytest.mark.parametrize('x', range(7))\ndef test_x(x): pass\n")
    for share in (1, 2):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.shard", "--shard", f"{share}/2"]
        run = subprocess.run(
            [*command, "--collect-only", "-p", "no:cacheprovider", str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        found += [line for line in run.stdout.splitlines() if "::" in line]
    assert sorted(found) == [f"test_x.py::test_x[{number}]" for number in range(7)]


@pytest.mark.parametrize(("code", "says"), [("import time; time.sleep(60)", "time limit"), ("1 / 0", "status 1")])
def test_a_step_that_hangs_or_fails_ends_alone(
    code: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"a.log": [sys.executable, "-c", "print('well')"], "b.log": [sys.executable, "-c", code]}
    monkeypatch.setattr(steps, "commands", lambda *_: both)
    started = time.monotonic()
    assert says in steps.run(OP, tmp_path, 1.0)
    assert time.monotonic() - started < 20
    assert "well" in (tmp_path / "a.log").read_text()


def test_steps_go_on_with_what_there_is_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(task: Task, out: Path, seconds: float) -> str:
        ran.append(task.name)
        return "done, 1 s"

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "lacking", lambda: None)
    monkeypatch.setattr(gpu_check, "PROBE", f"print({json.dumps(json.dumps(H100))})")
    assert gpu_check.main(["--out", str(tmp_path), "--minutes", "0.7", "--steps", "op-16k", "generate"]) == 0
    assert ran == ["generate"]
    assert "op-16k: not started: about 9" in capsys.readouterr().out
    (tmp_path / "gpu_check.json").write_text('{"schema": 1}')
    assert gpu_check.main(["--out", str(tmp_path), "--keep"]) == 2
    assert "must be 2, got 1" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["-1", "0", "many"])
def test_minutes_are_above_zero(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main([f"--minutes={given}"])
    assert f"minutes must be a number above 0, got {given}" in capsys.readouterr().err


def test_the_committed_table_is_a_blank_one_until_something_is_measured(tmp_path: Path) -> None:
    gpu_check.main(["--blank", "--out", str(tmp_path)])
    records = load(tmp_path / "gpu_check.json").records
    assert {record.reason for record in records} == {"not measured"} and {record.run for record in records} == {None}
    committed = ROOT / "tools" / "results" / "gpu_check.json"
    if all(record.status == "skipped" for record in load(committed).records):
        for suffix in (".json", ".txt"):  # tables are spaced as this version of rich does it
            fresh, old = ((folder / f"gpu_check{suffix}").read_text() for folder in (tmp_path, committed.parent))
            assert fresh.split() == old.split(), "tools/gpu_check --blank writes it anew"
