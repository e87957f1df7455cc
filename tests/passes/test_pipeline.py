"""The passes together: counts, dumps, and a graph that no pass has anything to do with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zsmerge_compile as zs
from tests.models_zoo import tiny
from zsmerge_compile.ops.contracts import DECODE, EXTEND


def test_counts_are_in_the_report() -> None:
    report = zs.compile(tiny("llama-gqa"), zs.ZSMergeConfig(budget=8), backend="eager").report
    expected = {"normalize_attention": 2, "drop_repeat_kv": 2, "insert_cache": 2}
    assert report.passes == {"prefill": expected, "decode": expected}
    assert [site.layer for site in report.sites] == [0, 1]
    assert all("modeling_llama.py" in site.source for site in report.sites)


def test_graph_inputs_are_the_contract() -> None:
    program = zs.compile(tiny("mistral-w8"), zs.ZSMergeConfig(budget=8), backend="eager").program
    state = [f"layer{i}_{field}" for i in range(2) for field in program.policy.state_fields]

    def names(gm: torch.fx.GraphModule) -> list[str]:
        return [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]

    assert names(program.decode) == ["input_ids", "seen", "active", *state]
    assert names(program.prefill) == ["input_ids", "position_ids", "rows", "seen", "pads", *state]
    assert len(program.decode.graph.find_nodes(op="call_function", target=DECODE)) == 2
    assert len(program.prefill.graph.find_nodes(op="call_function", target=EXTEND)) == 2


def test_dumps_are_numbered_and_show_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSMERGE_DUMP", str(tmp_path))
    zs.compile(tiny("falcon-new"), zs.ZSMergeConfig(budget=8), backend="eager")
    names = ["00_captured.py", "01_normalize_attention.py", "02_drop_repeat_kv.py", "03_insert_cache.py"]
    for graph, op in (("prefill", "zsmerge.extend"), ("decode", "zsmerge.decode")):
        assert sorted(path.name for path in (tmp_path / graph).iterdir()) == names
        captured, normal, _, cached = ((tmp_path / graph / name).read_text() for name in names)
        assert "scaled_dot_product_attention" in captured and "ops.zsmerge" not in captured
        assert normal.count("torch.ops.zsmerge.attention.default") == 2
        assert cached.count(f"torch.ops.{op}.default") == 2 and "attention_mask: " not in cached
