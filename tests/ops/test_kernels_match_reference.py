"""`ops.decode` and `ops.prefill`, in aten and with the C++ operators, against `ops.reference`, state for state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.states import assert_same_states
from tests.strategies import Case, cases, tokens, with_any_rule
from zsmerge_compile.ops import decode, prefill, reference
from zsmerge_compile.ops.cpp import build
from zsmerge_compile.ops.cpp import decode as cpp_decode
from zsmerge_compile.ops.cpp import extend as cpp_extend
from zsmerge_compile.ops.state import State
from zsmerge_compile.testing.tolerance import OP_FP32

ATTEND = {"aten": decode.attend, "cpp": cpp_decode.attend}
PARTS = {"aten": prefill.ATEN, "cpp": cpp_extend.PARTS}


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    build.load()


def copy(state: State) -> State:
    return State(*(tensor.clone() for tensor in state))


@pytest.mark.parametrize("attend", ATTEND)
@settings(max_examples=60, deadline=None)
@given(case=cases().flatmap(with_any_rule), steps=st.integers(1, 40), data=st.data())
def test_decode_step(attend: str, case: Case, steps: int, data: st.DataObject) -> None:
    """Each step is compared from the same state, so a tie broken by rounding cannot spread."""
    generator, state = case.generator(), case.empty()
    seen = torch.zeros(case.batch, dtype=torch.int64)
    for _ in range(steps):
        new = tokens(case, case.batch, 1, generator)
        active = torch.rand(case.batch, generator=generator) < 0.8
        ours, before = copy(state), copy(state)
        out = decode.step(ours, *new, seen, active, case.rule, ATTEND[attend])
        expected, state = reference.extend(before, *new, seen, (~active).long(), case.rule, decoded=True)
        torch.testing.assert_close(out[active], expected[active], atol=OP_FP32, rtol=OP_FP32)
        assert_same_states(ours, state)
        for after, was in zip(ours, before, strict=True):
            assert torch.equal(after[~active], was[~active])
        seen = seen + active


@pytest.mark.parametrize("parts", PARTS)
@settings(max_examples=60, deadline=None)
@given(case=cases().flatmap(with_any_rule), first=st.integers(1, 60), then=st.integers(1, 20), data=st.data())
def test_extend(parts: str, case: Case, first: int, then: int, data: st.DataObject) -> None:
    """A prompt on an empty cache, then more tokens for some rows, with padding."""
    generator, state = case.generator(), case.empty()
    seen = torch.zeros(case.batch, dtype=torch.int64)
    rows = torch.arange(case.batch)
    for n in (first, then):
        pads = torch.tensor([data.draw(st.integers(0, n)) for _ in rows])
        new = tokens(case, len(rows), n, generator)
        ours = copy(state)
        out = prefill.extend(ours, *new, rows, seen, pads, case.rule, PARTS[parts])
        mine = State(*(tensor[rows] for tensor in state))
        expected, folded = reference.extend(mine, *new, seen[rows], pads, case.rule)
        state = copy(state)
        for tensor, part in zip(state, folded, strict=True):
            tensor[rows] = part
        torch.testing.assert_close(out, expected, atol=OP_FP32, rtol=OP_FP32)
        assert_same_states(ours, state)
        seen[rows] += n - pads
        rows = torch.tensor(data.draw(st.permutations(range(case.batch)))[: data.draw(st.integers(1, case.batch))])


def test_felt_queries_bound_the_error() -> None:
    """Beyond the queries looked at, even full attention of every head could not move a score by 1e-6."""
    for decay, group in ((0.5, 1), (0.9, 4), (0.98, 8)):
        n = prefill.felt_queries(decay, group)
        assert decay**n * group / (1 - decay) <= prefill.SCORE_ERROR < decay ** (n - 2) * group / (1 - decay)
    assert prefill.felt_queries(1.0, 4) > 10**9
    assert prefill.felt_queries(0.0, 4) == 1
