"""The model and its optimizers."""

import torch
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.muon import Muon

MAX_POSITIONS = 4_096
_EMBEDDING_STD = 0.05
_QUERY_KEY_STD = 0.09


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA of 0.65 M parameters with 4 query and 2 key/value heads of 32 dimensions."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=_EMBEDDING_STD,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    _tie_queries_to_keys(model)
    return model


def build_optimizers(model: LlamaForCausalLM, lr: float) -> list[Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices: list[Parameter] = []
    others: list[Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01),
        AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True),
    ]


@torch.no_grad()
def _tie_queries_to_keys(model: LlamaForCausalLM) -> None:
    """Starts every query projection as its key projection: attention begins as a match of contents.

    Without it recall does not start within thousands of steps.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        key = attention.k_proj.weight.normal_(0, _QUERY_KEY_STD)
        heads = key.view(-1, attention.head_dim, key.shape[1])
        queries = heads.repeat_interleave(attention.num_key_value_groups, dim=0)
        attention.q_proj.weight.copy_(queries.reshape_as(attention.q_proj.weight))
