"""Prompts whose victims no rounding can change, so that caches can be compared in half precision, too.

Every query points along one direction of its key/value head; a key's share of that direction is its token's level,
and all else about queries, keys and values is noise. Of the tokens that compete for the context, as many as fit are
on levels of their own, a factor of twelve above the next: they stay, the others are merged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zsmerge_compile.ops.state import LayerLayout

WEAK, KEPT, LASTING = 0.0, 2.5, 5.0  # logits; a second prompt's best displace tokens that the first one kept


class Tokens(NamedTuple):
    """query [1, H, n, D]; key, value [1, G, n, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


def levels(layout: LayerLayout, first: int, second: int) -> Tensor:
    """Of the tokens of a prompt and of a second one [first + second]."""
    found = torch.full((first + second,), WEAK)
    random = torch.Generator().manual_seed(0)
    rivals = max(0, first - layout.proximity)  # whoever has left the ring
    # token 0 among the best: queries that see few tokens would else give weak ones a lot
    chosen = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(max(0, rivals - 1), generator=random)])
    chosen = chosen[: min(layout.context, rivals)]
    found[chosen] = KEPT
    found[chosen[: -(-len(chosen) // 2)]] = LASTING
    late = rivals + torch.randperm(second, generator=random)[: len(chosen) // 2]
    found[late] = LASTING
    return found


def prompts(
    layout: LayerLayout, scale: float, counts: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> list[Tokens]:
    """The two prompts, one row."""
    random = torch.Generator(device=device).manual_seed(1)
    level = levels(layout, *counts).to(device)
    total, group = len(level), layout.heads // layout.kv_heads

    def noise(heads: int, tokens: int = total) -> Tensor:
        return torch.randn(1, heads, tokens, layout.head_dim, generator=random, device=device)

    along = torch.nn.functional.normalize(noise(layout.kv_heads, 1), dim=-1)
    query = along.repeat_interleave(group, 1) / scale + 0.3 * noise(layout.heads)
    free = noise(layout.kv_heads)
    key = free - (free * along).sum(-1, keepdim=True) * along + level[:, None] * along
    parts = [part.to(dtype).split(list(counts), 2) for part in (query, key, noise(layout.kv_heads))]
    return [Tokens(*some) for some in zip(*parts, strict=True)]
