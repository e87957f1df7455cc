"""The models, one of each family, and their optimizers.

All are of 0.6 to 0.7 million parameters, with attention heads of 32 dimensions and rotary positions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from training.muon import Muon

MAX_POSITIONS = 4_096
WINDOW = 2_048  # tokens, Mistral's
_EMBEDDING_STD = 0.05
_QUERY_KEY_STD = 0.09


def build_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained model of one of FAMILIES."""
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = FAMILIES[family](
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=_EMBEDDING_STD,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.generation_config = GenerationConfig(**ends, do_sample=False)
    with torch.no_grad():
        for query, key in projections(model):
            tie(query, key, model.config.hidden_size // model.config.num_attention_heads)
    return model


def _llama(**fields: Any) -> PreTrainedModel:
    """Two query heads to each of two key/value heads."""
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, num_key_value_heads=2, intermediate_size=320, **fields))


def _mistral(**fields: Any) -> PreTrainedModel:
    """Two query heads to each of two key/value heads, every layer with a sliding window."""
    fields = dict(num_hidden_layers=3, num_key_value_heads=2, intermediate_size=320, sliding_window=WINDOW) | fields
    return MistralForCausalLM(MistralConfig(**fields))


def _falcon(**fields: Any) -> PreTrainedModel:
    """As the 7B: one key/value head, attention and feed-forward side by side; a layer more, as they are shallower."""
    return FalconForCausalLM(FalconConfig(num_hidden_layers=4, ffn_hidden_size=384, **fields))


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {"llama": _llama, "mistral": _mistral, "falcon": _falcon}


def build_optimizers(model: PreTrainedModel, lr: float) -> list[Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices: list[Parameter] = []
    others: list[Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01),
        AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True),
    ]


def projections(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """The query [H * D, hidden] and key [G * D, hidden] weights of every layer, as views of its parameters."""
    if isinstance(model, FalconForCausalLM):  # one matrix: the heads' queries, then one key and one value
        dim = model.config.hidden_size // model.config.num_attention_heads
        fused = [block.self_attention.query_key_value.weight for block in model.transformer.h]
        return [(weight[: -2 * dim], weight[-2 * dim : -dim]) for weight in fused]
    attentions = [layer.self_attn for layer in model.model.layers]
    return [(attention.q_proj.weight, attention.k_proj.weight) for attention in attentions]


def tie(query: Tensor, key: Tensor, dim: int) -> None:
    """Starts a query projection as its key projection, `dim` rows a head: attention begins as a match of contents.

    Without it recall does not start within thousands of steps.
    """
    key.normal_(0, _QUERY_KEY_STD)
    heads = key.view(-1, dim, key.shape[1])
    query.copy_(heads.repeat_interleave(query.shape[0] // key.shape[0], dim=0).reshape_as(query))
