"""Each stage's verifier accepts what its pass makes and names what it should not have left."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.graphs import context, trace
from zsmerge_compile.errors import UnsupportedGraphError
from zsmerge_compile.passes.drop_repeat_kv import drop_repeat_kv
from zsmerge_compile.passes.graph import PassContext
from zsmerge_compile.passes.normalize_attention import normalize_attention
from zsmerge_compile.passes.verify import verify

VOCAB, H, D = 128, 4, 8


class _Decoder(nn.Module):
    """`mix(x)` [B, H, T, D] of embedded tokens, then logits of the last."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, H * D)
        self.head = nn.Linear(H * D, VOCAB)
        self.mix = mix

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).unflatten(-1, (H, D)).transpose(1, 2)
        return self.head(self.mix(x).transpose(1, 2).flatten(2))[:, -1]


def _attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def _normalised(mix: Callable[[Tensor], Tensor], layers: int = 1) -> tuple[fx.GraphModule, PassContext]:
    gm = trace(_Decoder(mix).eval(), *(torch.ones(2, 11, dtype=torch.int64) for _ in range(3)), dynamic=True)
    ctx = context(layers)
    verify(gm, "capture", ctx)
    normalize_attention(gm, ctx)
    return gm, ctx


def test_a_legal_graph_passes_every_stage_before_the_cache() -> None:
    gm, ctx = _normalised(lambda x: _attend(_attend(x)), layers=2)
    verify(gm, "normalize_attention", ctx)
    assert drop_repeat_kv(gm, ctx) == 0
    verify(gm, "drop_repeat_kv", ctx)


def test_more_or_fewer_attentions_than_layers() -> None:
    gm, ctx = _normalised(_attend, layers=2)
    with pytest.raises(UnsupportedGraphError, match=r"attentions found must be 2 \(one per layer\), got 1 rewritten"):
        verify(gm, "normalize_attention", ctx)


UNKNOWN = {
    "weights read twice": lambda x: (weights := (x @ x.mT).softmax(-1)) @ x + weights.sum(-1, keepdim=True),
    "pooling over tokens": lambda x: x + (x.sum(-1, keepdim=True).softmax(2) * x).sum(2, keepdim=True),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_softmax_over_tokens_that_is_no_known_attention(name: str) -> None:
    gm, ctx = _normalised(lambda x: _attend(UNKNOWN[name](x)))
    with pytest.raises(
        UnsupportedGraphError, match=r"every softmax over tokens must be .* got softmax.*test_verify\.py"
    ):
        verify(gm, "normalize_attention", ctx)


def test_a_softmax_over_features_is_no_concern() -> None:
    gm, ctx = _normalised(lambda x: _attend(x.softmax(-1)))
    verify(gm, "normalize_attention", ctx)


def test_unequal_heads() -> None:
    gm, ctx = _normalised(
        lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :1], is_causal=True, enable_gqa=True)
    )
    with pytest.raises(UnsupportedGraphError, match="key and value heads must be equal divisors .* got 2 and 1 for 4"):
        verify(gm, "drop_repeat_kv", ctx)


def test_a_cache_that_was_never_inserted() -> None:
    gm, ctx = _normalised(_attend)
    with pytest.raises(UnsupportedGraphError, match="ops that write to a tensor must be 1 cache ops, got none"):
        verify(gm, "insert_cache", ctx)


def test_stages_are_known_by_name() -> None:
    gm, ctx = _normalised(_attend)
    with pytest.raises(UnsupportedGraphError, match="stage must be one of capture, "):
        verify(gm, "typo", ctx)
