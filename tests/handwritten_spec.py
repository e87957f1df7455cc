"""All that `zsmerge_compile` must be told of tests/handwritten.py."""

from __future__ import annotations

from torch import Tensor

from tests.handwritten import Storyteller
from zsmerge_compile.models.registry import register
from zsmerge_compile.models.spec import ModelSpec


def last_scores(model: Storyteller, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    scores: Tensor = model(input_ids, attention_mask.bool(), position_ids)
    return scores[:, -1]


def spec(model: Storyteller) -> ModelSpec:
    layers = len(model.stages)
    return ModelSpec(
        name="storyteller",
        num_layers=layers,
        vocab_size=model.words,
        max_positions=None,
        windows=(None,) * layers,
        call=last_scores,
    )


register(Storyteller, spec)
