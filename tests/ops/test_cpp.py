"""The C++ operators by themselves: every dtype, head size, number of heads and pattern of dead slots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor import config as inductor

from tests.strategies import SEEDS
from zsmerge_compile.errors import MissingBackendError
from zsmerge_compile.ops import fold, prefill
from zsmerge_compile.ops.cpp import build
from zsmerge_compile.ops.cpp.extend import blocks, in_turn, operator
from zsmerge_compile.ops.state import LayerLayout, Rule, allocate
from zsmerge_compile.testing.tolerance import OP_FP32

HALF = {torch.float32: OP_FP32, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # one rounding of the output


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    build.load()
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, new_key: Tensor, new_value: Tensor, entering: Tensor
) -> tuple[Tensor, Tensor]:
    """What `zsmerge::scored_attention` computes at scale 0.3, in fp32."""
    here = (torch.arange(key.shape[2]) == entering[:, None])[:, None, :, None]
    keys = torch.where(here, new_key[:, :, None].float(), key.float())
    values = torch.where(here, new_value[:, :, None].float(), value.float())
    p = torch.softmax(query.float() @ keys.mT * 0.3 + bias, -1)
    return p @ values, p.sum(2)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    heads=st.integers(1, 9),
    slots=st.one_of(st.integers(1, 40), st.integers(500, 1100)),
    dim=st.sampled_from([1, 7, 8, 16, 31, 32, 33, 64, 80, 96, 128]),
    dtype=st.sampled_from(list(HALF)),
    live=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    per_head=st.booleans(),
    seed=SEEDS,
)
def test_scored_attention(
    batch: int,
    groups: int,
    heads: int,
    slots: int,
    dim: int,
    dtype: torch.dtype,
    live: float,
    per_head: bool,
    seed: int,
) -> None:
    """Equal to a masked softmax, dead slots unread (they hold NaN), the new token in its slot whatever lies there."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(dtype)

    query = normal(batch, groups, heads, dim)
    key, value = normal(batch, groups, slots, dim), normal(batch, groups, slots, dim)
    new_key, new_value = normal(batch, groups, dim), normal(batch, groups, dim)
    entering = torch.randint(slots, (batch,), generator=make)
    alive = torch.rand(batch, groups, slots, generator=make) < live
    alive |= (torch.arange(slots) == entering[:, None])[:, None]
    bias = torch.randn(batch, groups, heads if per_head else 1, slots, generator=make)
    bias = bias.masked_fill(~alive[:, :, None], -torch.inf)
    expected, mass = attention(query, key, value, bias, new_key, new_value, entering)
    for buffer in (key, value):
        buffer.masked_fill_(~alive[..., None], torch.nan)
    out, received = torch.ops.zsmerge.scored_attention(query, key, value, bias, new_key, new_value, entering, 0.3)
    torch.testing.assert_close(out.float(), expected, atol=HALF[dtype], rtol=HALF[dtype])
    torch.testing.assert_close(received, mass, atol=OP_FP32, rtol=OP_FP32)


def test_more_threads_than_ranges_that_slots_divide_into() -> None:
    """Ranges are rounded up to whole slots: the last of those wanted would begin past the end."""
    torch.set_num_threads(80)
    make, slots = torch.Generator().manual_seed(0), 81_921
    query, key, value = (torch.randn(1, 1, n, 8, generator=make) for n in (1, slots, slots))
    new, entering = torch.randn(1, 1, 8, generator=make), torch.tensor([7])
    bias = torch.zeros(1, 1, 1, slots)
    out, mass = torch.ops.zsmerge.scored_attention(query, key, value, bias, new, new, entering, 0.3)
    expected = attention(query, key, value, bias, new, new, entering)
    torch.testing.assert_close((out, mass), expected, atol=OP_FP32, rtol=OP_FP32)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 2),
    heads=st.integers(1, 8),
    slots=st.integers(2, 150),
    columns=st.integers(1, 300),
    dim=st.sampled_from([7, 16, 33, 64, 80]),
    dtype=st.sampled_from(list(HALF)),
    window=st.one_of(st.none(), st.integers(1, 200)),
    seed=SEEDS,
)
def test_prompt_attention(
    groups: int, heads: int, slots: int, columns: int, dim: int, dtype: torch.dtype, window: int | None, seed: int
) -> None:
    """Outputs and scores of many tokens over a part-filled cache, as `ops.prefill.blocks` has them in fp32."""
    make = torch.Generator().manual_seed(seed)
    state = allocate(LayerLayout(heads * groups, groups, dim, 1, slots - 2, 0), 2, torch.float32)
    for buffer in (state.key, state.value):
        buffer.copy_(torch.randn(buffer.shape, generator=make).to(dtype))
    state.weight.copy_(torch.randint(3, state.weight.shape, generator=make))
    seen, pads = torch.tensor([slots, slots + 3]), torch.tensor([0, columns // 3])
    state.position.copy_(torch.randint(slots, state.position.shape, generator=make))
    rule = Rule(1, slots - 2, 0.6, 0.9, 0.3, window)
    prompt = [torch.randn(2, columns, h, dim, generator=make).to(dtype) for h in (heads * groups, groups, groups)]
    first = int(torch.randint(columns, (), generator=make))
    tokens = [t.transpose(1, 2) for t in prompt]
    small = state._replace(key=state.key.to(dtype), value=state.value.to(dtype))
    ours = blocks(small, *tokens, seen, pads, rule, first=first, want_out=True)
    expected = prefill.blocks(state, *(t.float() for t in tokens), seen, pads, rule, first=first, want_out=True)
    torch.testing.assert_close(ours[0].float(), expected[0], atol=HALF[dtype], rtol=HALF[dtype])
    for mass, specified in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(mass, specified, atol=OP_FP32, rtol=OP_FP32)


def arguments() -> list[Tensor | float]:
    sizes = (2, 2, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8), (2, 2, 1, 5), (2, 2, 8), (2, 2, 8)
    return [*(torch.randn(size) for size in sizes), torch.tensor([0, 4]), 0.3]


def test_operators_are_sound() -> None:
    """Schema, fakes and tracing, as torch checks them."""
    torch.library.opcheck(torch.ops.zsmerge.scored_attention.default, tuple(arguments()))
    query, key, slots = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    seen, pads, position = torch.tensor([9]), torch.tensor([1]), torch.zeros(1, 2, 5, dtype=torch.int32)
    prompt = (query, key, key, slots, slots, torch.zeros(1, 2, 1, 5), position, None, seen, pads, 0, 4, 0.3, 0.9)
    torch.library.opcheck(torch.ops.zsmerge.prompt_attention.default, prompt)
    residual, arrivals = residuals(torch.Generator(), 3, 2, 8), residuals(torch.Generator(), 3, 4, 8)
    torch.library.opcheck(torch.ops.zsmerge.absorb.default, (*residual, *arrivals[:6]))
    schema = str(torch.ops.zsmerge.extend.default._schema)
    assert str(operator()._schema) == schema.replace("zsmerge::", "zsmerge_cpp::")


@pytest.mark.parametrize(
    ("at", "wrong", "message"),
    [
        (1, torch.zeros(2, 2, 8, 5).mT, "key and value must be contiguous"),
        (2, torch.zeros(2, 2, 4, 8), "value must be"),
        (0, torch.zeros(2, 2, 3, 7), "query must be"),
        (3, torch.zeros(2, 2, 2, 5), "bias must be"),
        (4, torch.zeros(2, 2, 8, dtype=torch.float16), "new_key must be"),
        (6, torch.zeros(2), "entering must be"),
    ],
)
def test_scored_attention_refuses(at: int, wrong: Tensor, message: str) -> None:
    given = arguments()
    given[at] = wrong
    with pytest.raises(ValueError, match=message):
        torch.ops.zsmerge.scored_attention(*given)


def residuals(make: torch.Generator, pairs: int, slots: int, dim: int, ties: bool = False) -> fold.Residual:
    """Random slots, some free; `ties`: keys of few whole numbers, so that dot products are exact and often equal."""

    def numbers(*shape: int) -> Tensor:
        normal = torch.randn(1, pairs, slots, *shape, generator=make)
        return normal.clamp(-1, 1).round() if ties else normal

    weight = torch.randint(0, 3, (1, pairs, slots), generator=make).float()
    position = torch.randint(0, 99, (1, pairs, slots), generator=make, dtype=torch.int32)
    opened = torch.stack([torch.randperm(slots, generator=make) for _ in range(pairs)])[None].int()
    return fold.Residual(numbers(dim), numbers(dim), weight, weight / 3, position, position.float(), opened)


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(1, 4),
    slots=st.integers(1, 9),
    count=st.integers(0, 30),
    dim=st.sampled_from([3, 8, 64]),
    ties=st.booleans(),
    seed=SEEDS,
)
def test_absorb(pairs: int, slots: int, count: int, dim: int, ties: bool, seed: int) -> None:
    """Arrival after arrival joins the same slot as in `fold.in_turn`, ties and free slots included."""
    make = torch.Generator().manual_seed(seed)
    residual = residuals(make, pairs, slots, dim, ties)
    arrivals = residuals(make, pairs, min(count, 1) if ties else count, dim, ties)  # a mean of two rounds, and unties
    for ours, specified in zip(in_turn(residual, arrivals), fold.in_turn(residual, arrivals), strict=True):
        torch.testing.assert_close(ours, specified, atol=OP_FP32, rtol=OP_FP32)


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    build._command.cache_clear()
    nowhere = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    with nowhere, pytest.raises(MissingBackendError, match=r"apt install g\+\+"):
        build.library()
    build._command.cache_clear()


def test_what_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "zsmerge.cpp").write_text("#error no such luck\n")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    with pytest.raises(MissingBackendError, match="no such luck"):
        build.library()
    assert list((tmp_path / "cache").rglob("*.so")) == []
