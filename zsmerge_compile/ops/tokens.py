"""Tokens on their way to the cache's slots. Shapes: b rows, G key/value heads, n tokens, D head dim."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Tokens, or slots that hold merged ones, that look for a slot; weight 0 marks a hole."""

    key: Tensor  # [b, G, n, D]
    value: Tensor  # [b, G, n, D]
    weight: Tensor  # [b, G, n] tokens, 0 or 1 but for merged ones
    score: Tensor  # [b, G, n]
    position: Tensor  # [b, G, n] int32

    def take(self, index: Tensor, live: Tensor) -> Tokens:
        """The tokens at `index` [b, G, m], of which only those where `live` [b, G, m] count."""
        rows = index[..., None].expand(*index.shape, self.key.shape[-1])
        picked = (t.gather(2, index) for t in (self.weight, self.score))
        weight, score = (torch.where(live, t, 0.0) for t in picked)
        return Tokens(
            self.key.gather(2, rows), self.value.gather(2, rows), weight, score, self.position.gather(2, index)
        )
