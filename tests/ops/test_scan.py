"""`ops.scan` against `ops.reference`, state for state; its loops unrolled, as tracing one costs seconds.

The scan operator itself runs in every test of an exported bundle.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.states import assert_same_states
from tests.strategies import Case, cases, tokens, with_any_rule
from zsmerge_compile.ops import reference, scan
from zsmerge_compile.testing.tolerance import OP_FP32


def unrolled(step: Any, start: Any, sliced: Any) -> tuple[Any, torch.Tensor]:
    """The scan operator's meaning."""
    carried, stacked = start, []
    for index in range(sliced[0].shape[0]):
        carried, out = step(carried, tuple(part[index] for part in sliced))
        stacked.append(out)
    return carried, torch.stack(stacked)


@settings(max_examples=100, deadline=None)
@given(
    case=cases().flatmap(with_any_rule),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    data=st.data(),
)
def test_extend(case: Case, lengths: list[int], data: st.DataObject) -> None:
    """Prompts one after the other, each from the same state, rows that are all padding among them."""
    generator, state = case.generator(), case.empty()
    seen = torch.zeros(case.batch, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "scan", unrolled)
        for n in lengths:
            pads = torch.tensor([data.draw(st.integers(0, n)) for _ in range(case.batch)])
            new = tokens(case, case.batch, n, generator)
            out, ours = scan.extend(state, *new, seen, pads, case.rule)
            expected, state = reference.extend(state, *new, seen, pads, case.rule)
            torch.testing.assert_close(out, expected, atol=OP_FP32, rtol=OP_FP32)
            assert_same_states(ours, state)
            seen = seen + n - pads
