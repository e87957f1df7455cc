"""KV heads are cached once: repetition is undone where the graph proves it, and only there."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graphs import attentions, captured, context, count, trace
from tests.models_zoo import KV_HEADS, prompt
from zsmerge_compile.capture import capture
from zsmerge_compile.errors import UnsupportedGraphError
from zsmerge_compile.passes.drop_repeat_kv import drop_repeat_kv
from zsmerge_compile.passes.normalize_attention import normalize_attention
from zsmerge_compile.passes.repeats import Repeats
from zsmerge_compile.passes.verify import verify

B, H, G, T, D = 2, 12, 4, 5, 8
R = H // G


def _inputs(kv_heads: int = G) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, heads, T, D, generator=generator) for heads in (H, kv_heads, kv_heads))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _expanded(x: Tensor) -> Tensor:
    return x[:, :, None].expand(B, G, R, T, D).reshape(B, H, T, D)


def _rotated(x: Tensor) -> Tensor:
    """A rotary embedding over all heads, as in Falcon, and a norm over the head dim."""
    angle = torch.arange(T).float()[:, None] * torch.ones(D)
    half = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
    return F.layer_norm(x * angle.cos() + half * angle.sin(), (D,))


def _by_tokens(x: Tensor) -> Tensor:
    """Repeated while the tokens still come before the heads."""
    wide = torch.broadcast_to(x.transpose(1, 2)[:, :, :, None], (B, T, G, R, D)).flatten(2, 3)
    return wide.transpose(1, 2).reshape(B, H, T, D)


# How k (and v) of G heads become H, and whether the un-repeated heads are a node of the graph.
REPEATS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "expand": (_expanded, True),
    "repeat_interleave": (lambda x: x.repeat_interleave(R, dim=1), True),
    "contiguous": (lambda x: x.unsqueeze(2).expand(-1, -1, R, -1, -1).contiguous().flatten(1, 2), True),
    "stack": (lambda x: _expanded(x).clone().to(torch.float64).to(torch.float32), False),
    "before rotary": (lambda x: _rotated(_expanded(x)), False),
    "by tokens": (_by_tokens, False),
    "from one head": (lambda x: x[:, :1].expand(B, H, T, D), False),
    "tiled from one": (lambda x: x[:, :1].repeat(1, H, 1, 1), False),
    "twice": (lambda x: x[:, :2].repeat_interleave(2, 1).repeat_interleave(3, 1), False),
}
KEPT = {"from one head": 1, "tiled from one": 1, "twice": 2}


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_heads_are_undone(name: str) -> None:
    repeat, plain = REPEATS[name]
    inputs = _inputs()
    gm = trace(lambda q, k, v: _attend(q, repeat(k), repeat(v)), *inputs)
    assert normalize_attention(gm, context()) == 1
    want = gm(*inputs)
    assert drop_repeat_kv(gm, context()) == 1
    (site,) = attentions(gm)
    assert [node.meta["val"].shape[1] for node in site.args[1:3]] == [KEPT.get(name, G)] * 2
    if plain:
        assert {node.op for node in site.args[1:3]} == {"placeholder"}
        assert count(gm, "expand") == count(gm, "reshape") == count(gm, "slice") == 0
    torch.testing.assert_close(gm(*inputs), want, atol=1e-6, rtol=1e-6)
    assert drop_repeat_kv(gm, context()) == 0


class _Weighted(nn.Module):
    """Heads that are equal only because their weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(H, 1, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, _expanded(k) * self.scale, _expanded(v))


NEAR_MISSES = {
    "distinct": lambda q, k, v: _attend(q, k, v),
    "tiled in another order": lambda q, k, v: _attend(q, k.repeat(1, R, 1, 1), v.repeat(1, R, 1, 1)),
    "a term per head": lambda q, k, v: _attend(q, _expanded(k) + torch.arange(H).view(H, 1, 1), _expanded(v)),
    "a norm across heads": lambda q, k, v: _attend(
        q, F.layer_norm(_expanded(k).transpose(1, 2), (H, D), torch.ones(H, D)).transpose(1, 2), _expanded(v)
    ),
    "joined from two": lambda q, k, v: _attend(q, torch.cat([k[:, :1]] * H, 1), torch.cat([v[:, :1]] * H, 1)),
    "rolled": lambda q, k, v: _attend(q, _expanded(k).roll(1, 1), _expanded(v)),
    "zero weights": _Weighted(),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(name: str) -> None:
    gm = trace(NEAR_MISSES[name], *_inputs(H if name == "distinct" else G))
    assert normalize_attention(gm, context()) == 1
    before = gm.code
    assert drop_repeat_kv(gm, context()) == 0
    assert gm.code == before


def test_key_and_value_end_with_equally_many_heads() -> None:
    """12 heads each, of which 2 keys and 4 values are distinct: 4 serve both."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k[:, :2].repeat_interleave(6, 1), _expanded(v))

    inputs = _inputs()
    gm = trace(attend, *inputs)
    normalize_attention(gm, context())
    assert drop_repeat_kv(gm, context()) == 1
    (site,) = attentions(gm)
    assert [node.meta["val"].shape[1] for node in site.args[1:3]] == [4, 4]
    torch.testing.assert_close(gm(*inputs), attend(*inputs), atol=1e-6, rtol=1e-6)


def test_unequal_heads_that_nothing_repeats_are_refused() -> None:
    gm = trace(lambda q, k, v: _attend(q, k[:, :1], _expanded(v)), *_inputs())
    normalize_attention(gm, context())
    with pytest.raises(UnsupportedGraphError, match="key and value heads must be equal in number, got 1 and 12"):
        drop_repeat_kv(gm, context())


@pytest.mark.parametrize(
    "shape, factor",
    [((B, H * T, D), 1), ((B, G * R * T * D), 1), ((B, G, R, T, D), R), ((B * H, T, D), R), ((B, 2, 2 * R, T, D), R)],
)
def test_factors_survive_reshapes_they_can(shape: tuple[int, ...], factor: int) -> None:
    gm = trace(lambda x: _expanded(x).reshape(shape), _inputs()[1])
    (result,) = gm.graph.output_node().args
    dim = 0 if len(shape) == 3 and shape[0] != B else 2 if len(shape) == 5 else 1
    assert (Repeats().factor(result, dim) or 1) == factor


@pytest.mark.parametrize("name, attn", [("llama-gqa", "sdpa"), ("llama-gqa", "eager"), ("falcon-new", "sdpa")])
def test_families_cache_kv_heads_only(name: str, attn: str) -> None:
    model, ctx, graphs = captured(name, attn)
    for gm in (graphs.prefill, graphs.decode):
        normalize_attention(gm, ctx)
        assert drop_repeat_kv(gm, ctx) == 1
        verify(gm, "drop_repeat_kv", ctx)
        assert attentions(gm)[0].args[1].meta["val"].shape[1] == KV_HEADS[name]
    for gm, inputs in ((graphs.prefill, prompt(2, 17, pads=(0, 4))), (graphs.decode, prompt(3, 1))):
        with torch.no_grad():
            want = model(**inputs, use_cache=False).logits[:, -1]
        torch.testing.assert_close(gm(**inputs), want, atol=1e-5, rtol=1e-4)


def test_zeroed_weights_repeat_nothing() -> None:
    """All key heads of a multi-head model are equal once its weights are zero; the graph knows better."""
    model, ctx, _ = captured("llama-mha")
    model = type(model)(model.config).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    gm = capture(model, ctx.spec, 1).decode
    normalize_attention(gm, ctx)
    assert drop_repeat_kv(gm, ctx) == 0
    assert attentions(gm)[0].args[1].meta["val"].shape[1] == 4
