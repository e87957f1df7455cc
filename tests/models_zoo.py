"""Tiny transformers models of every family and variant, and a decoder that is not from transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCAB = 128
STD = 0.2  # large enough that attention is far from uniform


def _llama(attn: str, **fields: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64)
    return LlamaForCausalLM(LlamaConfig(**_common(attn, defaults, fields)))


def _mistral(attn: str, **fields: Any) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    defaults = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
    return MistralForCausalLM(MistralConfig(**_common(attn, defaults, fields)))


def _falcon(attn: str, **fields: Any) -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    defaults = dict(num_hidden_layers=2, num_attention_heads=4)
    return FalconForCausalLM(FalconConfig(**_common(attn, defaults, fields)))


def _common(attn: str, defaults: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    shared = dict(vocab_size=VOCAB, hidden_size=32, max_position_embeddings=8192, initializer_range=STD)
    ends = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False)
    return {**shared, **ends, **defaults, **fields, "attn_implementation": attn}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **parameters}}


_LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
_GQA = dict(num_key_value_heads=2)
_RW = dict(alibi=True, bias=True, multi_query=False, parallel_attn=False)

_BUILDERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "llama-mha": (_llama, {}),
    "llama-gqa": (_llama, _GQA),
    "llama-linear": (_llama, {**_GQA, **_rope(rope_type="linear", factor=4.0)}),
    "llama-llama3": (_llama, {**_GQA, **_rope(rope_type="llama3", **_LLAMA3)}),
    "llama-yarn": (
        _llama,
        {**_GQA, **_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048)},
    ),
    "mistral": (_mistral, dict(sliding_window=None)),
    "mistral-w8": (_mistral, dict(sliding_window=8)),
    "mistral-w4096": (_mistral, dict(sliding_window=4096)),
    "falcon-7b": (_falcon, {}),
    "falcon-new": (_falcon, dict(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon-rw": (_falcon, _RW),
}
FAMILIES: tuple[str, ...] = tuple(_BUILDERS)

# Key/value heads a cache must hold, by name; every model has 4 query heads unless overridden.
KV_HEADS = {name: 2 for name in FAMILIES} | {"llama-mha": 4, "falcon-7b": 1, "falcon-rw": 4}


def tiny(name: str, dtype: torch.dtype = torch.float32, attn: str = "sdpa", **overrides: Any) -> Any:
    """The tiny model `name` (one of FAMILIES) in eval mode: vocabulary 128, hidden 32, 2 layers, 4 heads, seeded.

    overrides are config fields. One-dimensional parameters (norms, biases) are shaken too, so that none is trivial.
    """
    build, fields = _BUILDERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FAMILIES.index(name))
        model = build(attn, **{**fields, **overrides})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def prompt(batch: int, length: int, seed: int = 0, pads: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Random input_ids, attention_mask and position_ids [batch, length], row i left-padded by pads[i] columns."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return dict(input_ids=ids, attention_mask=mask, position_ids=positions)
