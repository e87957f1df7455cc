"""What one layer's cache holds, and the numbers that rule it.

B batch, G key/value heads, S slots, R residual slots, D head dim. A layer's S = budget + 1 slots lie as

    [ ring: proximity + 1 | context | residual: R ]

Token t of a row sits in ring slot t % (proximity + 1), so one ring slot is free between steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """One layer's cache. A slot with weight 0 is empty: its other fields mean nothing, but are finite."""

    key: Tensor  # [B, G, S, D] model dtype, after rotary embedding
    value: Tensor  # [B, G, S, D] model dtype
    weight: Tensor  # [B, G, S] fp32, tokens in the slot
    score: Tensor  # [B, G, S] fp32, decayed attention received (eq. 5)
    position: Tensor  # [B, G, S] int32, of the newest member, in tokens from 0
    residual_key: Tensor  # [B, G, R, D] fp32 running mean; the slot's key is its rounding
    residual_value: Tensor  # [B, G, R, D] fp32
    residual_position: Tensor  # [B, G, R] fp32 mean position of the members (ALiBi)
    opened: Tensor  # [B, G, R] int32 order in which residual slots were opened: the first wins a tie


@dataclass(frozen=True)
class Rule:
    """The constants of one layer's cache op (SPEC section 1); counts are in slots or tokens."""

    proximity: int
    context: int
    alpha: float
    decay: float
    scale: float
    window: int | None = None
    merge: str = "segment"
    slopes: Tensor | None = None  # [H] fp32: ALiBi slope of each query head
    alibi_divisor: float = 1.0
    alibi_bf16: bool = False
    scoring: str = "received"  # what a score is (`ops/scores.py`)
    observed: int = 0  # "observed", "age": queries of a prompt, its last ones, whose attention is asked for
    kernel: int = 1  # "observed": tokens, an odd number, over which it is pooled
    pooling: str = "avg"  # "observed": or "max"
    merged: int = 0  # "age": tokens that take the value of one that leaves (`ops/cam.py`); 0: it is lost
    seed: Tensor | None = None  # [1] int64, of CaM's draws; None: their expectation
    sets: str | None = None  # "threshold", "fixed": a prompt's context tokens are merged in sets (`ops/sets.py`)
    pinned: int = 0  # sets: context slots of the highest scores, which are not merged
    threshold: float = 0.75  # sets: cosine up to which adjacent keys may be parted
    sigma: float = 5.0  # sets: distance over which members lose their share
    normalized: bool = False  # sets: values are means, not sums
    places: str = "text"  # how positions are counted (`ops/places.py`)
    frequencies: Tensor | None = None  # [D/2] fp32, radians per token: queries and keys come before their rotation
    magnitude: float = 1.0  # of the rotation: cosines and sines are multiplied by it

    @property
    def expiry(self) -> int | None:
        """Tokens after which a slot is emptied; where positions are counted in the cache, what is held stays near."""
        return self.window if self.places == "text" else None


@dataclass(frozen=True)
class LayerLayout:
    """How one layer's cache is allocated: `budget` = proximity + context + residual slots, one more in memory."""

    heads: int
    kv_heads: int
    head_dim: int
    proximity: int
    context: int
    residual: int
    window: int | None = None

    @property
    def budget(self) -> int:
        return self.proximity + self.context + self.residual

    @property
    def slots(self) -> int:
        return self.budget + 1

    def parts(self) -> dict[str, int | None]:
        """What the slots are for, and the window in tokens: with the shapes, all that a saved cache rests on."""
        return {name: getattr(self, name) for name in ("proximity", "context", "residual", "window")}


def allocate(layout: LayerLayout, batch_size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> State:
    """An empty cache of one layer for `batch_size` rows, all zeros."""
    rows = (batch_size, layout.kv_heads)
    slots, residual, dim = layout.slots, layout.residual, layout.head_dim

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*rows, *shape, dtype=dtype, device=device)

    return State(
        key=zeros(slots, dim, dtype=dtype),
        value=zeros(slots, dim, dtype=dtype),
        weight=zeros(slots),
        score=zeros(slots),
        position=zeros(slots, dtype=torch.int32),
        residual_key=zeros(residual, dim),
        residual_value=zeros(residual, dim),
        residual_position=zeros(residual),
        opened=zeros(residual, dtype=torch.int32),
    )


def alibi_bias(position: Tensor, merged: Tensor | None, dtype: torch.dtype, rule: Rule) -> Tensor:
    """ALiBi bias [B, H, ...] of slots at `position` [B, H or 1, ...] (Falcon's formula, its rounding included).

    Where `merged` is true the bias is slope * mean position, unrounded; elsewhere the model's own chain:
    slope and position in bf16 if `alibi_bf16`, their product rounded to bf16 and the model's dtype, then divided.
    """
    assert rule.slopes is not None
    slopes = rule.slopes.view(1, -1, *([1] * (position.dim() - 2)))
    exact = slopes * position / rule.alibi_divisor
    if not rule.alibi_bf16:
        return exact
    product = (slopes.to(torch.bfloat16) * position.to(torch.bfloat16)).to(dtype)
    rounded = (product / rule.alibi_divisor).float()
    return rounded if merged is None else torch.where(merged, exact, rounded)
