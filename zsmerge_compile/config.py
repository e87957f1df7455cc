"""What a user chooses about the cache, checked when it is made; resolved per layer when a model is compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from zsmerge_compile.errors import ConfigError, must

PREFILLS = ("full", "chunked")
MERGES = ("segment", "sequential")
SMALLEST = 3  # slots: one of each part


class Split(NamedTuple):
    """One layer's budget in slots per key/value head, by part (eq. 3)."""

    proximity: int
    context: int
    residual: int

    @property
    def budget(self) -> int:
        return self.proximity + self.context + self.residual


@dataclass(frozen=True)
class ZSMergeConfig:
    """ZSMerge's parameters (papers: Bp, Bc, Br, alpha, lambda).

    budget     slots per key/value head, at least 3; or one count per layer
    proximity  newest tokens kept: a count, or a share (float) of the budget; at least 1 slot
    residual   slots that hold merged tokens: a count, or a share of budget - proximity (at least 1 slot if above 0);
               0 is pure eviction, and with decay=1 H2O
    alpha      compensation alpha * log(weight) of eq. 8, in [0, 1]; the paper's is 0.6, ours was measured (README)
    decay      lambda of eq. 5, in [0, 1]
    prefill    "full": exact attention over the whole prompt, then one compression; "chunked": the prompt streams
               through in chunks of `chunk` tokens, memory O(budget + chunk)
    merge      how a prompt's left-over tokens reach the residual: "segment" means of contiguous groups,
               "sequential" one by one (eqs. 6, 7)
    chunk      tokens per chunk of a chunked prefill

    Context slots are what is left of the budget. Raises ConfigError.
    """

    budget: int | tuple[int, ...]
    proximity: int | float = 0.5
    residual: int | float = 0.02
    alpha: float = 1.0
    decay: float = 0.98
    prefill: str = "full"
    merge: str = "segment"
    chunk: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        _check(self.budget != (), "budget list", "one count per layer", "an empty list")
        for budget in self._budgets():
            _check(_is_count(budget) and budget >= SMALLEST, "budget", f"an integer of at least {SMALLEST}", budget)
        _check(_is_part(self.proximity) and self.proximity > 0, "proximity", _PART.format("above 0"), self.proximity)
        _check(_is_part(self.residual), "residual", _PART.format("of at least 0"), self.residual)
        for name in ("alpha", "decay"):
            value = getattr(self, name)
            _check(_is_number(value) and 0 <= value <= 1, name, "a number in [0, 1]", value)
        _check(self.prefill in PREFILLS, "prefill", f"one of {', '.join(PREFILLS)}", self.prefill)
        _check(self.merge in MERGES, "merge", f"one of {', '.join(MERGES)}", self.merge)
        _check(_is_count(self.chunk) and self.chunk >= 1, "chunk", "an integer of at least 1", self.chunk)
        for budget in self._budgets():
            self.split(budget)

    @classmethod
    def from_ratio(cls, ratio: float, *, length: int, **parameters: Any) -> ZSMergeConfig:
        """A budget of `ratio` (0 < ratio <= 1) of `length` tokens, rounded, at least 3 slots."""
        _check(_is_number(ratio) and 0 < ratio <= 1, "ratio", "a number in (0, 1]", ratio)
        _check(_is_count(length) and length >= 1, "length", "a count of tokens of at least 1", length)
        return cls(budget=max(SMALLEST, round(ratio * length)), **parameters)

    def layer_budgets(self, num_layers: int) -> tuple[int, ...]:
        """One budget per layer; raises ConfigError if the list does not have `num_layers` entries."""
        budgets = self._budgets()
        if not isinstance(self.budget, tuple):
            return budgets * num_layers
        _check(
            len(budgets) == num_layers, "budget list", f"one count per layer ({num_layers})", f"{len(budgets)} counts"
        )
        return budgets

    def split(self, budget: int, window: int | None = None) -> Split:
        """Parts of a layer of `budget` slots; a layer with a sliding window needs no more than `window` slots.

        Counts that a window leaves no room for shrink, the residual first: nothing is merged in such a layer anyway.
        """
        size = budget if window is None else min(budget, window)
        clamped = size < budget
        proximity = _resolve(self.proximity, size, clamped)
        _check(proximity <= size, "proximity", f"at most the budget of {size} slots", proximity)
        residual = _resolve(self.residual, size - proximity, clamped)
        if clamped:
            residual = min(residual, size - proximity)
        _check(
            residual <= size - proximity,
            "proximity + residual",
            f"at most the budget of {size} slots",
            proximity + residual,
        )
        return Split(proximity, size - proximity - residual, residual)

    def describe(self) -> dict[str, Any]:
        """Field names and values, as JSON can hold them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _budgets(self) -> tuple[int, ...]:
        return self.budget if isinstance(self.budget, tuple) else (self.budget,)


_PART = "a count {0}, or a share in [0.0, 1.0] {0}"


def _resolve(part: int | float, whole: int, clamped: bool) -> int:
    """A part in slots: a share is rounded to at least one slot; a count only shrinks where a window clamped it."""
    if isinstance(part, float):
        return max(1, round(part * whole)) if part > 0 else 0
    return min(part, whole) if clamped else part


def plain(value: Any) -> Any:
    """Python's own numbers, and tuples of them, for those of numpy and torch; anything else as it is."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(plain(one) for one in value)
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_part(value: object) -> bool:
    return _is_number(value) and (0 <= value <= 1 if isinstance(value, float) else value >= 0)  # type: ignore[operator]


def _check(good: bool, what: str, expected: str, got: object) -> None:
    if not good:
        raise ConfigError(must(what, expected, repr(got)))
