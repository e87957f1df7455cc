"""`zsmerge_triton::decode` against `ops.reference`, state for state: interpreted without a GPU, compiled with one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

from tests.ops.triton.comparing import DEVICE, TINY, check_decode  # noqa: E402
from tests.strategies import Case, cases, with_any_scores  # noqa: E402
from zsmerge_compile.ops.state import LayerLayout, Rule  # noqa: E402
from zsmerge_compile.ops.triton import launch_decode  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLOPES = 2.0 ** -torch.arange(1, 129, dtype=torch.float32).mul(0.1)


def made(heads: int, kv_heads: int, dim: int, parts: tuple[int, int, int], batch: int = 1, **rule: object) -> Case:
    """A case of a given shape; parts are proximity, context and residual."""
    proximity, context, residual = parts
    layout = LayerLayout(heads, kv_heads, dim, proximity, context, residual, rule.get("window"))  # type: ignore[arg-type]
    constants = dict(alpha=0.6, decay=0.98, scale=dim**-0.5) | rule
    return Case(layout, Rule(proximity, context, **constants), batch, 7)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    case=cases().flatmap(with_any_scores),
    held=st.integers(0, 24),
    steps=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([4, 8, 16]),
    tile=st.sampled_from([4, 16]),
    branch=st.booleans(),
)
def test_small_caches(
    case: Case, held: int, steps: int, dtype: torch.dtype, block: int, tile: int, branch: bool
) -> None:
    """Every kind of rule, caches from empty to full, inactive rows, several splits and tiles."""
    check_decode(case, held, steps, dtype, replace(TINY, block=block, tile=tile, branch=branch))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 4, 128), (8, 2, 128), (16, 1, 64), (71, 1, 64), (6, 2, 80), (2, 2, 96), (4, 1, 256)],
    ids=["llama-2", "llama-3", "falcon-40b", "falcon-7b", "phi-80", "mha-96", "gemma-256"],
)
def test_shapes_of_real_models(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Real head dims and groups by the table's own blocks, a cache that is no multiple of any of them, full."""
    check_decode(made(heads, kv_heads, dim, (70, 64, 3)), 140, 1, dtype, blocks=None)


@pytest.mark.parametrize("parts", [(9, 0, 3), (9, 8, 0), (1, 0, 0), (3, 0, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_parts_that_are_missing(parts: tuple[int, int, int], window: int | None) -> None:
    check_decode(made(4, 2, 16, parts, batch=2, window=window), 30, 2, torch.float32)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_alibi(dtype: torch.dtype, bf16: bool) -> None:
    """Positions large enough that bf16 rounds them, so the model's own rounding must be met; merged slots don't."""
    rule = dict(slopes=SLOPES[:4], alibi_divisor=4.0, alibi_bf16=bf16)
    check_decode(made(4, 2, 16, (20, 10, 3), **rule), 300, 2, dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU chooses the order itself")
def test_the_last_program_may_be_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes programs in their order; backwards, the first tile is the one that moves the tokens."""
    builder = type(launch_decode.finish_kernel).__init__.__globals__["interpreter_builder"]

    def backwards(x: int, y: int, z: int) -> None:
        builder.grid_idx = tuple(size - 1 - at for size, at in zip(builder.grid_dim, (x, y, z), strict=True))

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    check_decode(made(4, 2, 16, (9, 8, 3), batch=2), 30, 3, torch.float32)


@pytest.mark.parametrize("held", [13, 22, 40])
def test_ties(held: int) -> None:
    """All scores and all dot products equal: the oldest leaves, the residual slot opened first takes it."""
    check_decode(made(4, 2, 16, (5, 8, 4), batch=2, decay=0.0, alpha=0.0), held, 6, torch.float32, alike=True)


def test_everything_dead_but_the_new_token() -> None:
    check_decode(made(4, 2, 16, (20, 10, 3), batch=2), 0, 2, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("heads", "kv_heads", "batch"), [(32, 32, 1), (32, 8, 2), (71, 1, 1)])
def test_real_sizes(heads: int, kv_heads: int, batch: int, dtype: torch.dtype) -> None:
    """16k slots, real blocks, several steps: races between programs would show as wrong moves."""
    if DEVICE != "cuda":
        pytest.skip("needs a CUDA device")
    case = made(heads, kv_heads, 64 if heads == 71 else 128, (8192, 8000, 192), batch=batch)
    check_decode(case, 17_000, 5, dtype, blocks=None)
