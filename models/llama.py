"""LLaMA 1 to 3: rotary positions, any head grouping, no window."""

from typing import Any

from zsmerge_compile.models.spec import ModelSpec, causal_lm_spec, refuse_length_dependent_rope


def spec(model: Any) -> ModelSpec:
    """Spec of a `LlamaForCausalLM`; raises UnsupportedModelError for length-dependent rope."""
    refuse_length_dependent_rope(model.config)
    return causal_lm_spec("llama", model, max_positions=int(model.config.max_position_embeddings))
