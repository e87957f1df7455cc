"""tools/tensorrt_check as far as it runs without TensorRT: its comparison, its clock and its report."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tensorrt_tool import __main__ as tool
from tensorrt_tool.compare import compare, timed
from tests.models_zoo import prompt
from tests.tensorrt.conftest import Tools
from tests.tensorrt.test_step import BATCH, bound, eager, in_place, model
from zsmerge_compile.lower import tensorrt_needs
from zsmerge_compile.runtime.bound_step import BoundStep


def test_a_right_step_is_good_and_a_wrong_one_is_not(tools: Tools) -> None:
    base = eager("llama-gqa")
    ours, ids = bound(base), prompt(BATCH, 30)["input_ids"]
    told = compare(ours, in_place(base), in_place(base), ids, 12)
    assert told["good"] and told["tensorrt"]["same_token"] == 1 and told["tensorrt"]["kept_others"] == 0
    assert {"logits", "key", "score", "masters of keys"} <= set(told["tensorrt"]["errors"])
    assert set(told["tensorrt"]["errors"].values()) == {0.0}
    assert compare(ours, in_place(base), None, ids, 4)["good"]
    for factor in (1.01, float("nan")):
        wrong = model(base, lambda *given, factor=factor: factor * ours.decode_graph(*given))
        told = compare(wrong, in_place(base), in_place(base), ids, 3)
        assert not told["good"] and told["tensorrt"]["errors"]["logits"] != 0


class LeavesOne(BoundStep):
    """Does not swap one tensor of the last layer, which then holds the step before."""

    def __init__(self, *given: Any, place: int) -> None:
        super().__init__(*given)
        self._place = place

    def _swap(self, live: Any) -> None:
        super()._swap(live)
        one, spare = live[self._place], self._spare[self._place]
        one.data, spare.data = spare.data, one.data


@pytest.mark.parametrize("field", range(9))
def test_a_step_that_leaves_a_tensor_is_not_good(field: int, tools: Tools) -> None:
    """Logits are right in every other step, which begins from the reference's state: the state has to be looked at."""
    base = eager("llama-gqa")
    ours, ids = bound(base), prompt(BATCH, 6)["input_ids"]  # few, so that residual slots are opened by steps
    engine: Any = ours.decode_graph.engine  # type: ignore[attr-defined]
    wrong = model(base, LeavesOne(engine, base.interface, place=9 + field))
    assert compare(ours, in_place(base), in_place(base), ids, 24)["good"]
    assert not compare(wrong, in_place(base), in_place(base), ids, 24)["good"]


def test_times_are_told_for_each(tools: Tools) -> None:
    base = eager("llama-gqa")
    told = timed({"a": in_place(base), "b": bound(base)}, prompt(BATCH, 30)["input_ids"], blocks=1)
    assert set(told) == {"a", "b"} and min(told.values()) > 0


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case in a process of its own; one that fails leaves its log, and the others."""
    asked = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command[3:])
        if "tiny-falcon-rw:float16" in command:
            return SimpleNamespace(returncode=-11, stdout="half a line", stderr="CUDA error")
        return SimpleNamespace(returncode=0, stdout=f"noise\n{tool.MARK}{json.dumps(facts)}\n", stderr="")

    facts = {"good": True, "bundle_good": True, "ms_per_token": {"tensorrt": 1.0}}
    monkeypatch.setattr(tensorrt_needs, "missing", lambda *_: None)
    monkeypatch.setattr("zsmerge_compile.bench.machine.conditions", lambda _: {"device": "none"})
    monkeypatch.setattr(tool.subprocess, "run", run)
    given = ["--models", "tiny-falcon-rw", "--steps", "50", "--layers", "2", "--out", str(tmp_path)]
    assert tool.main(given) == 1
    told = json.loads((tmp_path / "tensorrt_check.json").read_text())
    assert [case["good"] for case in told["cases"]] == [True, False, True]
    assert told["cases"][1]["failed"] == "status -11" and told["cases"][1]["log"] == "half a lineCUDA error"
    assert told["versions"]["torch"] == torch.__version__
    assert asked[0] == ["--one", "tiny-falcon-rw:float32", "--steps", "50", "--layers", "2"]
    facts["bundle_good"] = False
    assert tool.main([*given[:1], "tiny-llama-gqa", "--out", str(tmp_path)]) == 1


def test_one_case_prints_its_facts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tensorrt_needs, "missing", lambda *_: None)
    monkeypatch.setattr(tool, "check", lambda case, steps, layers: {"case": case.name, "steps": steps})
    assert tool.main(["--one", "falcon-7b:bfloat16", "--steps", "3"]) == 0
    assert capsys.readouterr().out == tool.MARK + '{"case": "falcon-7b", "steps": 3}\n'
    with pytest.raises(SystemExit):
        tool.main(["--steps", "0"])
    assert "must be an integer of at least 1, got 0" in capsys.readouterr().err
