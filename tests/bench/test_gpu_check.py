"""tools/gpu_check: what it says without a GPU, and that a step can lose only itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools.benchmarks import gpu_check

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OUT": str(tmp_path)}
    run = subprocess.run([ROOT / "tools" / "gpu_check"], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: this machine must have a GPU") and run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_steps_are_commands_of_the_bench() -> None:
    from zsmerge_compile.cli import bench

    names = [task.name for task in gpu_check.TASKS]
    assert names[:3] == ["tests", "op", "figure3"] and len(set(names)) == len(names)
    for task in gpu_check.TASKS[1:]:
        assert task.arguments[0] == "--suite" and task.arguments[1] in bench.SUITES


@pytest.mark.parametrize(("code", "says"), [("import time; time.sleep(60)", "time limit"), ("1 / 0", "status 1")])
def test_a_step_that_hangs_or_fails_ends_alone(
    code: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "command", lambda *_: [sys.executable, "-c", code])
    started = time.monotonic()
    assert says in gpu_check.run(gpu_check.Task("x", 1.0, ("--suite", "op")), tmp_path, 60)
    assert time.monotonic() - started < 20


def test_the_blank_table_marks_every_row(tmp_path: Path) -> None:
    from zsmerge_compile.bench.records import load

    gpu_check.blank(tmp_path)
    records = load(tmp_path / "gpu_check.json").records
    assert {record.reason for record in records} == {"not measured"}
    assert {"figure3", "table1", "slots", "compile"} <= {record.suite for record in records}
    assert "not measured" in (tmp_path / "gpu_check.txt").read_text()
