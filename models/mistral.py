"""Mistral 7B: as LLaMA, with one sliding window for all layers, or none (v0.2 and later)."""

from typing import Any

from zsmerge_compile.models.spec import ModelSpec, causal_lm_spec, refuse_length_dependent_rope


def spec(model: Any) -> ModelSpec:
    """Spec of a `MistralForCausalLM`; raises UnsupportedModelError for length-dependent rope."""
    config = model.config
    refuse_length_dependent_rope(config)
    windows = (config.sliding_window,) * int(config.num_hidden_layers)
    return causal_lm_spec("mistral", model, max_positions=int(config.max_position_embeddings), windows=windows)
