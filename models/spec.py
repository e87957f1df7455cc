"""What the passes must be told about a model because no trace reveals it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zsmerge_compile.errors import UnsupportedModelError, must

Call = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ModelSpec:
    """One model, as the rest of the package sees it.

    name           family name for reports
    num_layers     attention layers, each of which must be found in the trace
    vocab_size     width of the logits
    max_positions  positions 0 .. max_positions - 1 are allowed; None: no limit
    windows        per layer, the sliding window in tokens that the config claims; None where it claims none
    call           (model, input_ids [B, T], attention_mask [B, T], position_ids [B, T]) -> logits [B, vocab] of the
                   last column, by the model's own forward and without a cache. attention_mask is 1 for tokens and 0
                   for left padding (int64), position_ids count tokens from 0 in each row
    """

    name: str
    num_layers: int
    vocab_size: int
    max_positions: int | None
    windows: tuple[int | None, ...]
    call: Call


# Their inverse frequencies are recomputed from the length of the input, so keys cached earlier would be stale.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def refuse_length_dependent_rope(config: Any) -> None:
    """Raise UnsupportedModelError if rotary frequencies depend on the input's length."""
    rope_type = str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))
    if any(name in rope_type for name in LENGTH_DEPENDENT_ROPE):
        expected = "one whose frequencies do not depend on the length (default, linear, llama3, yarn)"
        raise UnsupportedModelError(must("rope_type", expected, repr(rope_type)))


def causal_lm_call(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """`ModelSpec.call` of every transformers causal LM: only the last column reaches the head."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    out = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        return_dict=True,
        **keep,
    )
    logits: Tensor = out.logits
    return logits[:, -1]


def causal_lm_spec(
    name: str, model: Any, max_positions: int | None, windows: tuple[int | None, ...] | None = None
) -> ModelSpec:
    """Spec of a transformers causal LM whose config uses the library's common field names."""
    config = model.config
    layers = int(config.num_hidden_layers)
    return ModelSpec(
        name=name,
        num_layers=layers,
        vocab_size=int(config.vocab_size),
        max_positions=max_positions,
        windows=windows if windows is not None else (None,) * layers,
        call=causal_lm_call,
    )
