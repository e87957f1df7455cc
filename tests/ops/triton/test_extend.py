"""`zsmerge_triton::extend` against `ops.reference`, state for state: interpreted without a GPU, compiled with one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

from tests.ops.triton.comparing import DEVICE, SMALL, check_extend  # noqa: E402
from tests.ops.triton.test_decode import DTYPES, SLOPES, made  # noqa: E402
from tests.strategies import Case, cases, with_any_scores  # noqa: E402
from zsmerge_compile.ops.triton.blocks import extend_rule  # noqa: E402


@settings(max_examples=30, deadline=None)
@given(
    case=cases().flatmap(with_any_scores),
    held=st.sampled_from([0, 0, 3, 20]),
    n=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    held_keys=st.sampled_from([0, 32_768]),
)
def test_small_caches(case: Case, held: int, n: int, dtype: torch.dtype, held_keys: int) -> None:
    """Prompts on empty and on filled caches, both merge rules by both ways, padding, some rows only."""
    check_extend(case, held, n, dtype, replace(SMALL, held_keys=held_keys))


@pytest.mark.parametrize("held", [0, 60])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [
        (4, 4, 128, torch.bfloat16),
        (8, 2, 64, torch.float32),
        (3, 3, 80, torch.float16),
        (2, 1, 256, torch.bfloat16),
        (19, 1, 64, torch.bfloat16),
    ],
)
def test_shapes_of_real_models(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, held: int) -> None:
    check_extend(made(heads, kv_heads, dim, (20, 18, 3)), held, 50, dtype, blocks=None)


@pytest.mark.parametrize("merge", ["segment", "sequential"])
@pytest.mark.parametrize("held", [0, 70])
def test_window_and_alibi_over_several_blocks(merge: str, held: int) -> None:
    rule = dict(slopes=SLOPES[:4], alibi_divisor=4.0, alibi_bf16=True, window=40, merge=merge)
    check_extend(made(4, 2, 16, (12, 10, 5), batch=2, **rule), held, 90, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("merge", ["segment", "sequential"])
@pytest.mark.parametrize("held", [0, 3000])
def test_real_sizes(held: int, merge: str) -> None:
    if DEVICE != "cuda":
        pytest.skip("needs a CUDA device")
    check_extend(made(32, 8, 128, (512, 480, 32), batch=2, merge=merge), held, 4096, torch.bfloat16, blocks=None)


@pytest.mark.gpu
@pytest.mark.parametrize("held_keys", [0, 32_768])
def test_sequential_merge_at_real_sizes(held_keys: int) -> None:
    """Thousands of arrivals one after the other, the masters' keys in memory and in registers."""
    if DEVICE != "cuda":
        pytest.skip("needs a CUDA device")
    blocks = replace(extend_rule(2, 128), held_keys=held_keys)
    case = made(8, 2, 128, (512, 480, 200), merge="sequential")
    check_extend(case, 0, 8192, torch.bfloat16, blocks)
