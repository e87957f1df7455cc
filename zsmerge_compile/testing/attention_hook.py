"""Run an untouched model with only its attention call replaced, and what the replacement must know of the model.

LLaMA and Mistral look their attention function up in transformers' AttentionInterface, and hand over key/value heads
before repeating them. Falcon, and decoders from elsewhere, call torch's scaled_dot_product_attention: that call is
intercepted by a TorchFunctionMode, which touches neither torch nor the model.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# (q [B, H, T, D], k [B, G, T, D], v [B, G, T, D], scale) -> [B, H, T, D]; keys as cached, after any rotation
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]

_NAME = "zsmerge_oracle"
_USE_INTERFACE = ("llama", "mistral")


def replaced_attention(model: nn.Module, attention: Attention, kv_heads: int) -> AbstractContextManager[None]:
    """Within this context every attention call of `model` goes to `attention`; everything is restored at its end."""
    if getattr(getattr(model, "config", None), "model_type", None) in _USE_INTERFACE:
        return _through_interface(model, attention)
    return _through_sdpa(model, attention, kv_heads)


@contextmanager
def implementation(config: Any, name: str) -> Iterator[None]:
    """The config names another attention implementation for a while."""
    given = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = given


@contextmanager
def _through_interface(model: Any, attention: Attention) -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def replacement(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        return attention(query, key, value, scaling).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[_NAME] = replacement
    try:
        with implementation(model.config, _NAME):
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_NAME]


class _ReplaceSdpa(TorchFunctionMode):
    def __init__(self, attention: Attention, kv_heads: int) -> None:
        super().__init__()
        self.attention, self.kv_heads = attention, kv_heads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = self._sdpa if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        repeats = key.shape[1] // self.kv_heads  # each key/value head may have been repeated for its query heads
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        return self.attention(query, key[:, ::repeats], value[:, ::repeats], scale)


@contextmanager
def _through_sdpa(model: Any, attention: Attention, kv_heads: int) -> Iterator[None]:
    with _ReplaceSdpa(attention, kv_heads):
        if getattr(getattr(model, "config", None), "model_type", None) == "falcon":
            with implementation(model.config, "sdpa"):  # "eager" spells attention out in matmuls
                yield
        else:
            yield


def kv_heads_of(config: Any) -> int:
    """Key/value heads that a cache must hold, from a transformers config."""
    if getattr(config, "model_type", None) != "falcon":
        return int(config.num_key_value_heads)
    if config.new_decoder_architecture or not config.multi_query:
        return int(config.num_kv_heads)
    return 1


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slope of each of `heads` heads, float32 [heads].

    For a power of two they are 2^(-8/heads), its square, its cube, ...; otherwise those of the next lower power of
    two, followed by every other slope of the next higher one.
    """
    lower = 2 ** math.floor(math.log2(heads))

    def geometric(count: int) -> Tensor:
        return torch.tensor(2.0 ** (-8.0 / count)) ** torch.arange(1, count + 1)

    return torch.cat([geometric(lower), geometric(2 * lower)[::2][: heads - lower]])


def alibi_of(model: Any, kv_heads: int) -> "Sequence[Alibi | None]":
    """One Alibi per KV head, or None for each where the model's config claims no ALiBi."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "alibi", False):
        return [None] * kv_heads
    slopes = alibi_slopes(config.num_attention_heads).chunk(kv_heads)
    # spelled out in matmuls, Falcon's attention gets the bias in its logits and once more in its mask
    twice = config._attn_implementation == "eager"
    return [Alibi(group, model.dtype, twice) for group in slopes]


class Alibi:
    """The bias that Falcon adds to the logits of one KV head's query heads: slope * position / sqrt(D), rounded.

    transformers multiplies slope and position in bfloat16, whatever the model's dtype, brings the product to that
    dtype and divides there. A merged entry has no counterpart in transformers, so its bias is not rounded.
    """

    def __init__(self, slopes: Tensor, dtype: torch.dtype, twice: bool = False) -> None:
        self.slopes, self.dtype, self.twice = slopes[:, None], dtype, twice  # slopes [rep, 1]

    def __call__(self, positions: list[float], weights: list[int], head_dim: int) -> Tensor:
        """Mean positions and weights of m entries -> [rep, m], float32."""
        root = math.sqrt(head_dim)
        exact = torch.tensor(positions, dtype=torch.float32)
        product = (self.slopes.bfloat16() * exact.bfloat16()).to(self.dtype)
        unmerged, merged = (product / root).float(), self.slopes * exact / root
        if self.twice:  # the logits are in float32, so this share is not rounded again
            unmerged, merged = unmerged + product.float() / root, 2 * merged
        return torch.where(torch.tensor(weights) > 1, merged, unmerged)
