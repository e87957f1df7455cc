"""The seam for cache policies: what the passes and the runtime ask of one, and all they know of it.

A policy decides the budget of each layer, the state of its slots, how tokens are scored, which one is the victim,
what happens to it and what a prompt keeps. The last four live in its two cache ops, whose first arguments are

    decode(query, new_key, new_value, *state, seen, active, *arguments)       one token per row
    extend(query, new_key, new_value, *state, rows, seen, pads, *arguments)   a prompt or a chunk of one

both mutating `state` in place and returning the attention output (schemas: `ops/contracts.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from zsmerge_compile.ops.state import LayerLayout


@dataclass(frozen=True)
class Site:
    """One attention of the model, as the passes found it."""

    layer: int
    name: str  # the graph node
    source: str  # file:line, or the module's path
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # tokens
    slopes: tuple[float, ...] | None = None  # ALiBi, per query head
    alibi_divisor: float = 1.0
    alibi_bf16: bool = False
    frequencies: tuple[float, ...] | None = None  # [D/2] radians per token, where the policy rotates by itself
    magnitude: float = 1.0  # of that rotation


@runtime_checkable
class CachePolicy(Protocol):
    """A way to keep a cache within its budget."""

    name: str
    decode_op: Any  # torch._ops.OpOverload
    extend_op: Any
    state_fields: tuple[str, ...]
    scoring: str  # see `ops/scores.py`
    places: str  # see `ops/places.py`
    merges_context: bool  # ring or context take in tokens that leave (`ops/cam.py`, `ops/sets.py`)
    max_tokens: int | None  # tokens a row may hold; None: as many as the model has positions

    @property
    def state_kind(self) -> str:
        """Whose state it is: caches of another kind cannot take it, whatever its shapes (`Cache.load`)."""

    @property
    def chunk(self) -> int | None:
        """Columns of a chunk of a prompt; None: prompts go in whole."""

    def budgets(self, num_layers: int) -> tuple[int, ...]:
        """Slots per key/value head of each layer. Raises ConfigError."""

    def describe(self) -> dict[str, Any]:
        """Its parameters, as JSON can hold them."""

    def layouts(self, sites: Sequence[Site]) -> tuple[LayerLayout, ...]:
        """Budgets per layer, in the sites' order."""

    def allocate(
        self, layout: LayerLayout, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        """An empty state of one layer, in the order of `state_fields`; the first three are key, value, weight."""

    def arguments(self, site: Site, layout: LayerLayout) -> tuple[Any, ...]:
        """Trailing arguments of both ops; a tensor among them becomes a buffer of the graphs."""
