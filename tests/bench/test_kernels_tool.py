"""tools/kernels without a GPU: what it refuses, which python it takes, what tune writes and that kernels read it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tuned")

from kernels_tool import __main__ as tool  # noqa: E402

from zsmerge_compile.ops.triton import blocks  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RULE = blocks.rule(2, 128, 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["aot", "--kernel", "nope"], "invalid choice: 'nope'"),
        (["aot", "--model", "nope"], "invalid choice: 'nope'"),
        (["tune", "--model", "nope"], "invalid choice: 'nope'"),
        (["aot", "--kernel", "split"], "--out must be a folder other than"),
        (["aot", "--arch", "90", "--out", str(tool.RESULTS)], "--out must be a folder other than"),
    ],
)
def test_mistakes_never_reach_the_committed_table(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels_tool.aot._write", lambda *_: pytest.fail("written"))
    with pytest.raises(SystemExit) as done:
        tool.main(arguments)
    assert done.value.code == 2 and says in capsys.readouterr().err


def test_no_variant_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels_tool.aot.launches", lambda *_: [])
    assert tool.main(["aot", "--kernel", "split", "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_choices_are_the_kernels_there_are() -> None:
    from kernels_tool.variants import launches

    made = launches(tool.SHAPES["LLaMA-3-8B"], torch.float32, 132)
    assert {launch.kernel.__name__.removesuffix("_kernel") for launch in made} == set(tool.KERNELS)


@pytest.mark.parametrize("told", [True, False])
def test_a_python3_that_has_everything_serves(told: bool, tmp_path: Path) -> None:
    """A machine without a .venv and without a network: nothing is installed."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "tools" / "kernels", tmp_path / "tools" / "kernels")
    (tmp_path / "tools" / "env.sh").write_text("echo a .venv would be made >&2; exit 9\n")
    name = "mine" if told else "python3"
    python = tmp_path / "bin" / name
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$0 $*"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"} | ({"PYTHON": str(python)} if told else {})
    run = subprocess.run(
        [tmp_path / "tools" / "kernels", "tune"], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith(f"bin/{name} -m kernels_tool tune\n")


def test_candidates_are_plans_that_kernels_can_run() -> None:
    from kernels_tool.tune import candidates

    for itemsize, dim, group in ((2, 128, 4), (4, 64, 71), (2, 256, 8)):
        found = list(candidates(itemsize, dim, group))
        assert found[0] == blocks.rule(itemsize, dim, group) and len(set(found)) > 20
        for candidate in found:
            plan = blocks.plan(candidate, 8, 16_385, group, 132)
            assert (plan.splits - 1) * plan.chunk < 16_385 <= plan.splits * plan.chunk
            assert plan.blocks.tile >= 32 * plan.blocks.finish_warps


def test_the_best_is_right_and_fastest_over_all_sizes() -> None:
    from kernels_tool.tune import best_of

    fast, even = replace(RULE, block=32), replace(RULE, stages=1)
    assert best_of({RULE: [2.0, 2.0], fast: [1.0, 1.9], even: [1.5, 1.0]}) == even
    assert best_of({RULE: [2.0, 2.0], fast: [1.0, math.inf], even: [math.inf, 1.0]}) == RULE, "wrong results don't win"
    assert best_of({RULE: [math.inf, 2.0], even: [1.0, 1.0]}) == even, "the rule may not fit"
    assert best_of({RULE: [math.inf, 2.0]}) is None


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table of one's own in the package's place."""
    monkeypatch.setattr(blocks, "TABLE", tmp_path / "blocks.json")
    blocks.measured.cache_clear()
    yield tmp_path / "blocks.json"
    blocks.measured.cache_clear()


def test_tune_writes_what_the_kernels_read(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape and the architecture that were measured get the entry's blocks, all others the rule's."""
    from kernels_tool import tune

    best = replace(RULE, block=32, warps=8, tile=1024)

    def sweep(shape: Any, dtype: Any, sizes: list[tuple[int, int]], *_: Any) -> tune.Times:
        return {RULE: [2.0] * len(sizes), best: [1.0] * len(sizes)}

    table.write_text(json.dumps({"decode": {"sm_80 16 bit d=64 r=1": asdict(RULE)}, "extend": {}}))
    monkeypatch.setattr(tune, "sweep", sweep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tune.launch_decode, "device_facts", lambda index: (90, 132))
    assert tool.main(["tune", "--model", "LLaMA-3-8B", "--dtype", "bf16", "--slots", "1024", "--batch", "1"]) == 0
    found = json.loads(table.read_text())
    key = blocks.shape_key(2, 128, 4, 90)
    assert set(found["decode"]) == {key, "sm_80 16 bit d=64 r=1"} and found["measured"][key]["gpu"] == "a GPU"
    assert found["measured"][key]["sizes"]["1024 slots, batch 1"]["best_ms"] == 1.0
    blocks.measured.cache_clear()
    assert blocks.decode_blocks(2, 128, 4, 90) == best != RULE
    assert blocks.decode_blocks(2, 128, 4, 80) == RULE and blocks.decode_blocks(2, 128, 8, 90) == blocks.rule(2, 128, 8)
    assert blocks.extend_blocks(2, 128, 90) == blocks.extend_rule(2, 128), "prompts are not tuned"


def test_tune_says_where_nothing_is_right(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kernels_tool import tune

    monkeypatch.setattr(tune, "sweep", lambda *_: {RULE: [math.inf]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.launch_decode, "device_facts", lambda index: (90, 132))
    assert tool.main(["tune", "--model", "LLaMA-3-8B", "--dtype", "bf16", "--slots", "1024", "--batch", "1"]) == 1
    assert "no blocks gave the reference's result" in capsys.readouterr().err and not table.exists()
