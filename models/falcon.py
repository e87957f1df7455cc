"""Falcon: 7B (multi-query), 40B and 180B (new decoder architecture) with rotary positions, RW with ALiBi."""

from typing import Any

from zsmerge_compile.models.spec import ModelSpec, causal_lm_spec, refuse_length_dependent_rope


def spec(model: Any) -> ModelSpec:
    """Spec of a `FalconForCausalLM`; raises UnsupportedModelError for length-dependent rope."""
    config = model.config
    if config.alibi:  # transformers builds (and ignores) rotary tables all the same, and ALiBi knows no last position
        return causal_lm_spec("falcon", model, max_positions=None)
    refuse_length_dependent_rope(config)
    return causal_lm_spec("falcon", model, max_positions=int(config.max_position_embeddings))
