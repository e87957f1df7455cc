"""The command line: what it refuses in one sentence, what it leaves alone, what it says it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zsmerge_compile.bench import command, plan, plots, presets
from zsmerge_compile.bench.presets import Choice
from zsmerge_compile.bench.records import Record, Results, load
from zsmerge_compile.bench.session import Session
from zsmerge_compile.cli import main

CPU = torch.device("cpu")
TINY = ["bench", "--suite", "flat", "--model", "tiny", "--contexts", "64", "--budgets", "16", "--device", "cpu"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is built: every row takes a millisecond. The suites that were run."""
    ran: list[str] = []

    def run(self: Session, group: Any) -> None:
        ran.append(group.suite)
        for row in group.rows:
            self.results.add(Record(**group.facts(row, CPU), status="measured", ms=1.0, ms_low=1.0, ms_high=1.0))

    monkeypatch.setattr(Session, "run", run)
    monkeypatch.setattr("zsmerge_compile.bench.machine.copy_bandwidth", lambda device: 10.0)
    return ran


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_results_are_json_and_no_folder(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    for name, sentence in {
        "results.txt": "--out must be a file whose name ends in .json",
        "folder.json": "--out must be a file, got the folder",
        "": "--out must be a file whose name ends in .json",
        "file/results.json": "--out must be in a folder that can be written to",
    }.items():
        assert sentence in refused([*TINY, "--out", str(tmp_path / name)], capsys)
        assert sentence in refused([*TINY, "--blank", "--out", str(tmp_path / name)], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json"] and measured == []
    assert main([*TINY, "--out", str(tmp_path / "new" / "results.json")]) == 0


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:77"])
def test_devices_that_are_not_there(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--device", device, "--out", str(tmp_path / "r.json")]
    assert f"--device must be cuda (where torch finds one) or cpu, got {device}" in refused(arguments, capsys)


def test_suites_without_a_row_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "r.json")]
    for extra in ([], ["--list"], ["--blank"]):
        arguments = ["bench", "--suite", "op", "table1", "--model", "llama-125m", "--device", "cpu", *extra, *out]
        assert "must be rows of --suite table1, got none with --model llama-125m" in refused(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("minutes", ["-1", "0", "inf", "nan", "soon"])
def test_minutes_are_above_zero(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["bench", f"--minutes={minutes}"])
    assert done.value.code == 2
    assert f"minutes must be a number above 0, got {minutes}" in capsys.readouterr().err


def test_what_was_written_is_told(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = Results(tmp_path / "blank.json", [], plan.unmeasured(presets.flat(Choice(gpu=False)), CPU))
    assert command.write(blank) == ".txt; nothing to plot"
    if plots.installed():
        assert main([*TINY, "--out", str(tmp_path / "r.json")]) == 0
        assert "r.json and .txt and .png" in capsys.readouterr().err and (tmp_path / "r.png").exists()
    monkeypatch.setattr(plots, "installed", lambda: False)
    assert command.write(blank) == ".txt; plots need matplotlib"


def test_only_missing_groups_are_measured(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--append", "--missing", "--out", str(tmp_path / "r.json")]
    assert main([*TINY, *out]) == 0 and measured == ["flat"]
    assert main([*TINY, *out]) == 0 and measured == ["flat"], "all there"
    assert "has every row" in capsys.readouterr().err
    wider = [*TINY[:5], "--contexts", "64", "128", *TINY[7:]]
    assert main([*wider, *out]) == 0 and measured == ["flat", "flat"], "a group is measured whole"
    assert [(r.context, r.run) for r in load(tmp_path / "r.json").records] == [(64, 2), (128, 2)]
    monkeypatch.setattr("zsmerge_compile.bench.machine._processor", lambda: "another")
    assert main([*wider, *out]) == 0 and len(measured) == 3, "another machine's figures are none"
    capsys.readouterr()
    assert "--missing must be given with --append" in refused([*TINY, "--missing", *out[2:]], capsys)


def test_a_row_too_large_for_the_machine_is_not_missing() -> None:
    (group,) = presets.flat(Choice(gpu=False, model="tiny", contexts=(64,), budgets=(16,)))
    results = Results(Path("r.json"), [], [])
    assert plan.missing([group], results, (), CPU, memory=2**30) == [group]
    assert plan.missing([group], results, (), CPU, memory=1) == []


def test_an_old_file_is_not_added_to(tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"schema": 1, "records": []}))
    assert "must be 2, got 1" in refused([*TINY, "--append", "--out", str(tmp_path / "r.json")], capsys)
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == 1 and measured == []
