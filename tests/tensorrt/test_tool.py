"""tools/tensorrt_check as far as it runs without TensorRT: its comparison, its clock and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorrt_tool import __main__ as tool
from tensorrt_tool.compare import compare, timed
from tests.models_zoo import prompt
from tests.tensorrt.conftest import Tools
from tests.tensorrt.test_step import BATCH, bound, eager, in_place, model
from zsmerge_compile.lower import tensorrt_needs


def test_a_right_step_is_good_and_a_wrong_one_is_not(tools: Tools) -> None:
    base = eager("llama-gqa")
    ours, ids = bound(base), prompt(BATCH, 30)["input_ids"]
    told = compare(ours, in_place(base), in_place(base), ids, 12)
    assert told["good"] and told["same_token"] == 1 and set(told["errors"]["tensorrt"].values()) == {0.0}
    for factor in (1.01, float("nan")):
        wrong = model(base, lambda *given, factor=factor: factor * ours.decode_graph(*given))
        told = compare(wrong, in_place(base), in_place(base), ids, 3)
        assert not told["good"] and told["errors"]["tensorrt"]["logits"] != 0


def test_times_are_told_for_each(tools: Tools) -> None:
    base = eager("llama-gqa")
    told = timed({"a": in_place(base), "b": bound(base)}, prompt(BATCH, 30)["input_ids"], blocks=1)
    assert set(told) == {"a", "b"} and min(told.values()) > 0


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(case: tool.Case, steps: int, layers: int | None) -> dict[str, Any]:
        assert (steps, layers) == (50, 2)
        if case.dtype == "float16":
            raise RuntimeError("no kernel")
        return {"good": True, "ms_per_token": {"tensorrt": 1.0}}

    monkeypatch.setattr(tensorrt_needs, "missing", lambda *_: None)
    monkeypatch.setattr("zsmerge_compile.bench.machine.conditions", lambda _: {"device": "none"})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(tool, "check", check)
    given = ["--models", "falcon-rw", "--steps", "50", "--layers", "2", "--out", str(tmp_path)]
    assert tool.main(given) == 1
    told = json.loads((tmp_path / "tensorrt_check.json").read_text())
    assert [case["good"] for case in told["cases"]] == [True, False, True]
    assert told["cases"][1]["failed"] == "RuntimeError: no kernel"
