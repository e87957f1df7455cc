"""How far apart two right answers may be in bfloat16 and float16."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from zsmerge_compile.models.spec import ModelSpec
from zsmerge_compile.testing.attention_hook import implementation
from zsmerge_compile.testing.references import positions_of

FAMILIES = ("llama", "mistral", "falcon")  # whose attention implementation, heads and ALiBi the config tells


def is_known(model: nn.Module) -> bool:
    """Whether the model is of a transformers family that this package has a spec for."""
    return getattr(getattr(model, "config", None), "model_type", None) in FAMILIES


class Noise:
    """noise(ids, mask): the largest difference between the logits of transformers' sdpa and eager attention.

    Over all columns of ids [B, T]. With a short input that is a matter of luck, so it counts for no less than that of
    two random rows of `length` tokens. A model whose implementation cannot be chosen, or whose two differ by more
    than rounding (ALiBi, which Falcon's eager attention adds twice), is compared with its own fp32 copy instead.
    """

    def __init__(self, model: Any, spec: ModelSpec, length: int) -> None:
        self.model, self.spec, self.length = model, spec, length

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor) -> float:
        return max(self._of(ids, mask), self._usual)

    @cached_property
    def _usual(self) -> float:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.spec.vocab_size, (2, self.length), generator=generator)
        ids = ids.to(next(self.model.parameters()).device)
        return self._of(ids, torch.ones_like(ids))

    @cached_property
    def _copy(self) -> Any:
        return copy.deepcopy(self.model).float()

    def _of(self, ids: Tensor, mask: Tensor) -> float:
        if not is_known(self.model):
            columns = range(ids.shape[1], 0, -max(1, ids.shape[1] // 12))
            return max(self._at_the_end(ids[:, :n], mask[:, :n]) for n in columns)
        if getattr(self.model.config, "alibi", False):
            return _furthest(_all_logits(self.model, ids, mask), _all_logits(self._copy, ids, mask), mask)
        with implementation(self.model.config, "sdpa"):
            sdpa = _all_logits(self.model, ids, mask)
        with implementation(self.model.config, "eager"):
            return _furthest(sdpa, _all_logits(self.model, ids, mask), mask)

    def _at_the_end(self, ids: Tensor, mask: Tensor) -> float:
        """Of the last column, all that `ModelSpec.call` gives."""
        ours, copied = (self.spec.call(m, ids, mask, positions_of(mask)).float() for m in (self.model, self._copy))
        return _furthest(ours, copied, mask[:, -1])


def _all_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False)
    logits: Tensor = out.logits.float()
    return logits


def _furthest(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Between logits [..., vocab] at the tokens of mask [...]."""
    return float((one - other).masked_fill(~mask.bool()[..., None], 0.0).abs().max())
