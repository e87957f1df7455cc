"""When a row stops: what we add to transformers' stopping criteria, and which of them need no look at each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList


class LastPosition(StoppingCriteria):
    """Stops a row whose next token would have no position."""

    def __init__(self, cache: Any, max_positions: int) -> None:
        self._cache, self.max_positions = cache, max_positions

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        full: Tensor = self._cache.seen_tokens >= self.max_positions
        return full.to(input_ids.device)


class PadAfterStop(StoppingCriteria):
    """Stops nothing. transformers pads the rows that have stopped only where a criterion has this attribute."""

    eos_token_id = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Watched(StoppingCriteriaList):
    """The same criteria; `tell` learns of the columns [B, T] and of the rows [B] that stop with the last."""

    def __init__(self, criteria: StoppingCriteriaList, tell: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__(criteria)
        self._tell = tell

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        self._tell(input_ids, done)
        return done


class Stops(NamedTuple):
    """All there is to know of criteria that look at nothing but the last column and the cache.

    width          columns, the prompt's included, at which every row stops
    ends           [E] tokens after which a row stops, or None
    max_positions  tokens a row's cache can hold, or None
    remind         transformers' criterion behind `width`: it warns of lengths the model was not made for
    """

    width: int
    ends: Tensor | None
    max_positions: int | None
    remind: MaxLengthCriteria


def stops_of(criteria: StoppingCriteriaList) -> Stops | None:
    """What the criteria say, or None where one of them is of another kind."""
    kinds = {type(criterion): criterion for criterion in criteria}
    known = {MaxLengthCriteria, EosTokenCriteria, LastPosition, PadAfterStop}
    if len(kinds) != len(criteria) or not kinds.keys() <= known or MaxLengthCriteria not in kinds:
        return None
    longest, ends, last = kinds[MaxLengthCriteria], kinds.get(EosTokenCriteria), kinds.get(LastPosition)
    return Stops(longest.max_length, ends and ends.eos_token_id, last and last.max_positions, longest)
