"""Every spelling of attention becomes one op with the same numbers, and nothing else does."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graphs import attentions, captured, context, count, trace
from tests.models_zoo import prompt
from zsmerge_compile.errors import UnsupportedGraphError
from zsmerge_compile.passes.graph import attention_sites, where
from zsmerge_compile.passes.normalize_attention import normalize_attention
from zsmerge_compile.passes.verify import verify

B, H, T, D = 2, 4, 6, 8
SCALE = 1 / math.sqrt(D)
LOW = torch.finfo(torch.float32).min


def _inputs(kv_heads: int = H, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v, a causal bool mask and a bias per head."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, heads, T, D, generator=generator, dtype=dtype) for heads in (H, kv_heads, kv_heads))
    seen = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T)
    return q, k, v, seen, torch.randn(B, H, 1, T, generator=generator, dtype=dtype)


def _float(seen: Tensor) -> Tensor:
    return torch.where(seen, torch.zeros(()), LOW)


SPELLINGS = {
    "sdpa": lambda q, k, v, seen, bias: F.scaled_dot_product_attention(q, k, v, seen),
    "sdpa with a scale": lambda q, k, v, seen, bias: F.scaled_dot_product_attention(q, k, v, seen, scale=0.7),
    "sdpa with a bias": lambda q, k, v, seen, bias: F.scaled_dot_product_attention(q, k, v, bias),
    "sdpa causal": lambda q, k, v, seen, bias: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "eager": lambda q, k, v, seen, bias: (q @ k.mT * SCALE + _float(seen)).softmax(-1) @ v,
    "no scale": lambda q, k, v, seen, bias: (q @ k.mT + _float(seen)).softmax(-1) @ v,
    "no mask": lambda q, k, v, seen, bias: (q @ k.mT * SCALE).softmax(-1) @ v,
    "scaled query": lambda q, k, v, seen, bias: ((q * SCALE) @ k.transpose(2, 3) + _float(seen)).softmax(-1) @ v,
    "division": lambda q, k, v, seen, bias: (q @ k.transpose(-1, -2) / math.sqrt(D) + _float(seen)).softmax(3) @ v,
    "tensor scale": lambda q, k, v, seen, bias: (q @ k.mT / torch.tensor(8.0).sqrt() + _float(seen)).softmax(-1) @ v,
    "number first": lambda q, k, v, seen, bias: (_float(seen) + SCALE * (q @ k.mT)).softmax(-1) @ v,
    "key permuted": lambda q, k, v, seen, bias: (q @ k.permute(0, 1, 3, 2) * SCALE + bias).softmax(-1) @ v,
    "mask first": lambda q, k, v, seen, bias: (torch.add(bias, q @ k.mT) * SCALE).softmax(-1) @ v,
    "two biases": lambda q, k, v, seen, bias: ((q @ k.mT + bias) * SCALE + _float(seen)).softmax(-1) @ v,
    "subtracted": lambda q, k, v, seen, bias: (q @ k.mT * SCALE - bias).softmax(-1) @ v,
    "alpha": lambda q, k, v, seen, bias: torch.add(q @ k.mT * SCALE, bias, alpha=3).softmax(-1) @ v,
    "shifted": lambda q, k, v, seen, bias: (q @ k.mT * SCALE + _float(seen) + 5.0).softmax(-1) @ v,
    "filled": lambda q, k, v, seen, bias: (q @ k.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1) @ v,
    "filled, integers": lambda q, k, v, seen, bias: (q @ k.mT).masked_fill(seen.int() == 0, -1e9).softmax(-1) @ v,
    "where": lambda q, k, v, seen, bias: torch.where(seen, q @ k.mT * SCALE, -1e30).softmax(-1) @ v,
    "where, swapped": lambda q, k, v, seen, bias: torch.where(~seen, torch.tensor(LOW), q @ k.mT).softmax(-1) @ v,
    "filled and biased": lambda q, k, v, seen, bias: (q @ k.mT + bias).masked_fill(~seen, LOW).softmax(-1) @ v,
    "dropout": lambda q, k, v, seen, bias: F.dropout((q @ k.mT + bias).softmax(-1), 0.5, training=False) @ v,
    "fp32": lambda q, k, v, seen, bias: (q @ k.mT * SCALE).softmax(-1, dtype=torch.float32).to(q.dtype) @ v,
    "upcast": lambda q, k, v, seen, bias: (
        ((q.float() @ k.float().mT) * SCALE + bias.float()).softmax(-1) @ v.float()
    ).to(q.dtype),
    "in place": lambda q, k, v, seen, bias: (q @ k.mT).mul_(SCALE).add_(bias).softmax(-1).contiguous() @ v,
    "function": lambda q, k, v, seen, bias: F.softmax(torch.matmul(q, k.swapaxes(2, 3)) * SCALE, dim=-1).matmul(v),
}


MQA = [pytest.param(name, 1, id=f"{name}, one kv head") for name in ("sdpa", "eager", "two biases", "upcast")]


@pytest.mark.parametrize("name, kv_heads", [*((pytest.param(name, H, id=name)) for name in SPELLINGS), *MQA])
def test_every_spelling_becomes_one_op_with_the_same_numbers(name: str, kv_heads: int) -> None:
    inputs = _inputs(kv_heads)
    gm = trace(SPELLINGS[name], *inputs)
    assert normalize_attention(gm, context()) == 1
    assert len(attentions(gm)) == 1
    assert count(gm, "softmax") == count(gm, "matmul") == count(gm, "scaled_dot_product_attention") == 0
    torch.testing.assert_close(gm(*inputs), SPELLINGS[name](*inputs), atol=1e-5, rtol=1e-5)
    assert normalize_attention(gm, context()) == 0


@pytest.mark.parametrize("name", ["fp32", "upcast", "filled"])
def test_half_precision_is_cached_as_such(name: str) -> None:
    inputs = _inputs(dtype=torch.bfloat16)
    gm = trace(SPELLINGS[name], *inputs)
    assert normalize_attention(gm, context()) == 1
    (site,) = attentions(gm)
    assert all(node.meta["val"].dtype == torch.bfloat16 for node in site.all_input_nodes[:3])
    torch.testing.assert_close(gm(*inputs), SPELLINGS[name](*inputs), atol=0.03, rtol=0.03)


def test_enable_gqa_keeps_its_heads_and_the_scale_defaults_to_the_head_dim() -> None:
    q, k, v, seen, _ = _inputs(kv_heads=2)
    gm = trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), q, k, v)
    assert normalize_attention(gm, context()) == 1
    (site,) = attentions(gm)
    assert site.args[3:] == (None, True, SCALE)
    torch.testing.assert_close(
        gm(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), atol=1e-5, rtol=1e-5
    )


NEAR_MISSES = {
    "softmax over queries": lambda q, k, v, seen, bias: (q @ k.mT).softmax(-2) @ v,
    "no product below": lambda q, k, v, seen, bias: (q @ k.mT).softmax(-1).sum(-1),
    "no product above": lambda q, k, v, seen, bias: bias.expand(B, H, T, T).softmax(-1) @ v,
    "weights on the right": lambda q, k, v, seen, bias: k.mT @ (q @ k.mT).softmax(-1),
    "no softmax": lambda q, k, v, seen, bias: (q @ k.mT).sigmoid() @ v,
    "mixture of three dims": lambda q, k, v, seen, bias: (q[0] @ k[0].mT).softmax(-1) @ v[0],
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(name: str) -> None:
    gm = trace(NEAR_MISSES[name], *_inputs())
    before = gm.code
    assert normalize_attention(gm, context()) == 0
    assert gm.code == before


def test_weights_used_twice_are_left_alone() -> None:
    def returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v + weights.sum(-1, keepdim=True)

    gm = trace(returned, *_inputs()[:3])
    assert normalize_attention(gm, context()) == 0


REFUSED = {
    "attention dropout must be 0": lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v, dropout_p=0.25),
    "attention dropout must be": lambda q, k, v, *_: F.dropout((q @ k.mT).softmax(-1), 0.25, training=True) @ v,
    "must be scaling, masking or a cast, got tanh": lambda q, k, v, seen, bias: (
        (torch.tanh(q @ k.mT / 30) * 30 + bias).softmax(-1) @ v
    ),
    "must be scaling, masking or a cast, got mul": lambda q, k, v, *_: (q @ k.mT * (k @ q.mT)).softmax(-1) @ v,
    "over the same tokens": lambda q, k, v, *_: F.scaled_dot_product_attention(q[:, :, :1], k, v),
    "of one head dim": lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v[..., :4]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_cache_cannot_represent_is_refused(message: str) -> None:
    gm = trace(REFUSED[message], *_inputs())
    with pytest.raises(UnsupportedGraphError, match=message) as raised:
        normalize_attention(gm, context())
    assert re.search(r"graphs\.py:\d+", str(raised.value))  # the line in the forward of `trace`


class _Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class _Stack(nn.Module):
    """Blocks under a name of their own, called in another order than they are numbered."""

    def __init__(self, order: list[int], numbered: bool) -> None:
        super().__init__()
        self.order = order
        self.stufen = nn.ModuleList(_Block() for _ in order) if numbered else nn.ModuleDict({"a": _Block()})
        self.numbered = numbered

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.stufen[index](x) if self.numbered else self.stufen["a"](x)
        return x


@pytest.mark.parametrize("numbered, expected", [(True, [1, 0, 2]), (False, [0, 1, 2])])
def test_layers_are_numbered_by_module_or_else_in_order(numbered: bool, expected: list[int]) -> None:
    gm = trace(_Stack([1, 0, 2], numbered), torch.randn(B, H, T, D))
    assert normalize_attention(gm, context()) == 3
    assert [layer for layer, _ in attention_sites(gm)] == expected
    assert "test_normalize_attention.py" in where(attentions(gm)[0])


@pytest.mark.parametrize(
    "name, attn",
    [
        ("llama-gqa", "sdpa"),
        ("llama-gqa", "eager"),
        ("falcon-new", "eager"),
        ("falcon-rw", "sdpa"),
        ("falcon-rw", "eager"),
    ],
)
def test_families(name: str, attn: str) -> None:
    model, ctx, graphs = captured(name, attn)
    for gm in (graphs.prefill, graphs.decode):
        assert normalize_attention(gm, ctx) == 1
        verify(gm, "normalize_attention", ctx)
    for gm, inputs in ((graphs.prefill, prompt(2, 17, pads=(0, 4))), (graphs.decode, prompt(3, 1))):
        with torch.no_grad():
            want = model(**inputs, use_cache=False).logits[:, -1]
        torch.testing.assert_close(gm(**inputs), want, atol=1e-5, rtol=1e-4)


def test_the_verifier_names_the_softmax_that_was_left() -> None:
    _, ctx, graphs = captured("llama-gqa", "eager")
    with pytest.raises(UnsupportedGraphError, match=r"attentions found must be 1 .* softmax left: softmax .*layers\.0"):
        verify(graphs.prefill, "normalize_attention", ctx)
