"""Schemas, fakes and mutation of the registered ops; and what Inductor makes of the decode step."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from zsmerge_compile.ops import contracts, decode
from zsmerge_compile.ops.cpp import build
from zsmerge_compile.ops.cpp import decode as cpp_decode
from zsmerge_compile.ops.state import LayerLayout, Rule, State, allocate

LAYOUT = LayerLayout(heads=4, kv_heads=2, head_dim=16, proximity=31, context=30, residual=3)
RULE = Rule(LAYOUT.proximity, LAYOUT.context, 0.6, 0.98, 0.25)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
CAM = replace(RULE, scoring="age", observed=1, merged=8, seed=torch.tensor([7]))
SETS = replace(RULE, sets="threshold", pinned=9, threshold=0.1, sigma=2.0)
ALIBI = replace(RULE, window=128, slopes=SLOPES, alibi_divisor=4.0, alibi_bf16=True)


def arguments(n: int, rule: Rule, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    state = allocate(LAYOUT, 2, dtype)
    q, k, v = (torch.randn(2, heads, n, LAYOUT.head_dim).to(dtype) for heads in (4, 2, 2))
    seen = torch.tensor([0, 0])
    if n == 1:
        return q, k, v, *state, seen, torch.tensor([True, False]), *contracts.spelled(rule)
    return q, k, v, *state, torch.arange(2), seen, torch.tensor([0, 3]), *contracts.spelled(rule)


@pytest.mark.parametrize("rule", [RULE, ALIBI, CAM, SETS], ids=["causal", "alibi-window", "cam", "kvmerger"])
@pytest.mark.parametrize(("op", "n"), [(contracts.DECODE, 1), (contracts.EXTEND, 40)], ids=["decode", "extend"])
def test_opcheck_cache_ops(op: Any, n: int, rule: Rule) -> None:
    torch.library.opcheck(op, arguments(n, rule))


def test_opcheck_attention() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    torch.library.opcheck(contracts.ATTENTION, (q, k, k, None, True, 0.3))


@pytest.mark.parametrize("op", [contracts.DECODE, contracts.EXTEND])
def test_schema_declares_every_state_tensor_as_mutated_and_nothing_else(op: Any) -> None:
    written = tuple(a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    assert written == State._fields


@pytest.mark.parametrize("attend", [decode.attend, cpp_decode.attend], ids=["aten", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [RULE, ALIBI, CAM], ids=["causal", "alibi-window", "cam"])
def test_inductor_compiles_the_step_without_copying_keys_or_values(rule: Rule, dtype: torch.dtype, attend: Any) -> None:
    """fullgraph, and no buffer as large as K or V in the generated code (index_put_ is done in place)."""
    args, (seen, active) = arguments(1, rule, dtype), (12, 13)
    build.load()

    def step(*args: Any) -> torch.Tensor:
        state, given = State(*args[3:seen]), Rule(*args[active + 1 :])
        return decode.step(state, *args[:3], args[seen], args[active], given, attend)

    with torch.no_grad():
        expected_args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        expected = contracts.DECODE(*expected_args)
        out, code = run_and_get_code(torch.compile(step, fullgraph=True, dynamic=False), *args)
    found = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", "".join(code))
    sizes = [tuple(int(d) for d in match.split(",") if d.strip()) for match in found]
    assert sizes, "the generated code must allocate something, or this test reads it wrongly"
    cache = args[3].numel()
    assert max(torch.Size(size).numel() for size in sizes) < cache // 2
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(out[0], expected[0], atol=tolerance, rtol=tolerance)
    for name, ours, theirs in zip(State._fields, args[3:12], expected_args[3:12], strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
