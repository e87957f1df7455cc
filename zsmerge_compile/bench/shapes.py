"""Models by name: the shapes of well-known checkpoints with random weights, built where they will run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from zsmerge_compile.errors import InputError, must

POSITIONS = 262_144  # room for every context measured; the released checkpoints stop earlier
_NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # nothing stops a timed generate


@dataclass(frozen=True)
class Shape:
    """A transformers config that a name stands for; `layers` replaces its depth where set."""

    name: str
    family: str
    fields: Mapping[str, Any] = field(hash=False)
    layers: int | None = None

    @property
    def full_depth(self) -> int:
        return int(self.fields["num_hidden_layers"])

    @property
    def depth(self) -> int:
        return self.layers or self.full_depth

    @property
    def heads(self) -> int:
        return int(self.fields["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.fields.get("num_key_value_heads", 1))

    @property
    def head_dim(self) -> int:
        return int(self.fields["hidden_size"]) // self.heads

    def config(self) -> Any:
        """The transformers config."""
        from transformers import AutoConfig

        fields = {"tie_word_embeddings": False, "max_position_embeddings": POSITIONS, **_NO_ENDS, **self.fields}
        return AutoConfig.for_model(self.family, **{**fields, "num_hidden_layers": self.depth})

    def build(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Any:
        """The model in eval mode, its weights drawn on `device` (no copy passes through the CPU)."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(self.config(), dtype=dtype).eval()

    def parameters(self) -> int:
        return _sizes(self.name, self.depth)[0]

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of weights that one decode step must read: all but an untied input embedding."""
        return _sizes(self.name, self.depth)[1] * dtype.itemsize

    def kv_bytes(self, tokens: int, batch: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values of `tokens` tokens in `batch` rows, all layers."""
        return 2 * self.depth * batch * self.kv_heads * tokens * self.head_dim * dtype.itemsize


def named(name: str, layers: int | None = None) -> Shape:
    """A known shape; raises InputError for another name."""
    if name not in SHAPES:
        raise InputError(must("--model", f"one of {', '.join(SHAPES)}", name))
    family, fields = SHAPES[name]
    return Shape(name, family, fields, layers)


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, theta: float) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-125m": ("llama", _llama(768, 2048, 12, 12, 4, 32_000, 1e4)),
    "llama-2-7b": ("llama", _llama(4096, 11_008, 32, 32, 32, 32_000, 1e4)),
    "llama-2-13b": ("llama", _llama(5120, 13_824, 40, 40, 40, 32_000, 1e4)),
    "llama-3-8b": ("llama", _llama(4096, 14_336, 32, 32, 8, 128_256, 5e5)),
    "mistral-7b": ("mistral", {**_llama(4096, 14_336, 32, 32, 8, 32_768, 1e6), "sliding_window": None}),
    "falcon-7b": (
        "falcon",
        {
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "bias": False,
            "alibi": False,
            "vocab_size": 65_024,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": ("llama", _llama(64, 128, 2, 4, 2, 256, 1e4)),  # for trying the tools
}


@cache
def _sizes(name: str, layers: int) -> tuple[int, int]:
    """Parameters in all, and those a step reads, counted on a model without storage."""
    model = named(name, layers).build("meta", torch.float32)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return total, total - (0 if tied else embedding.numel())
