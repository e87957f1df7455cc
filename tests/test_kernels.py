"""Which kernel runs: by op, device and shape, and never in silence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zsmerge_compile as zs
from tests.models_zoo import tiny
from zsmerge_compile.lower.kernels import choose
from zsmerge_compile.ops.contracts import ATTENTION, DECODE, EXTEND
from zsmerge_compile.ops.state import LayerLayout


def program(device: str, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, **policy: Any) -> Any:
    """As much of a program as the choice looks at."""
    layouts = (LayerLayout(heads=8, kv_heads=2, head_dim=head_dim, proximity=8, context=7, residual=1),)
    told = SimpleNamespace(**{"name": "p", "merges_context": False, "places": "text", "scoring": "age", **policy})
    return SimpleNamespace(device=torch.device(device), dtype=dtype, layouts=layouts, policy=told)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def names(given: Any) -> list[str]:
    return [choose(op, given).name for op in (DECODE, EXTEND)]


def test_c_plus_plus_on_a_cpu() -> None:
    assert all(name.startswith("ops.cpp (") for name in names(program("cpu")))


@pytest.mark.usefixtures("ampere")
def test_triton_on_a_gpu() -> None:
    assert all(name.startswith("ops.triton (") for name in names(program("cuda")))


@pytest.mark.usefixtures("ampere")
def test_shapes_that_triton_does_not_serve_are_named() -> None:
    decode, extend = names(program("cuda", head_dim=4096))
    assert decode.startswith("ops.decode (aten nodes, compiled, not Triton: ") and "4096" in decode
    assert extend.startswith("zsmerge.extend.default (one opaque call, not Triton: ")


@pytest.mark.usefixtures("ampere")
def test_policies_that_triton_does_not_know_are_named() -> None:
    assert all("not Triton: the merging of p" in name for name in names(program("cuda", merges_context=True)))
    assert all("not Triton: positions by place" in name for name in names(program("cuda", places="cache")))
    assert all("not Triton: scores of kind distance" in name for name in names(program("cuda", scoring="distance")))


def test_aten_elsewhere_and_other_ops_as_they_are() -> None:
    assert names(program("meta")) == ["ops.decode (aten nodes, compiled)", "zsmerge.extend.default (one opaque call)"]
    assert choose(ATTENTION, program("cpu")).run is ATTENTION


def test_the_report_names_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsmerge_compile.lower.inductor.compile_graph", lambda gm, inputs: gm)
    compiled = zs.compile(tiny("llama-gqa"), zs.ZSMergeConfig(8))
    decode, extend = names(compiled.program)
    assert compiled.report.kernels == {"decode": decode, "extend": extend, "step": "called directly"}
