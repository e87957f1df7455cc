"""The baseline of equal memory: plain static attention over the same slots, without scores, weights or merging."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from zsmerge_compile.lower.kernels import Kernel
from zsmerge_compile.ops.decode import put
from zsmerge_compile.ops.state import Rule, State


def plain_step(query: Tensor, new_key: Tensor, new_value: Tensor, *rest: Any) -> Tensor:
    """`zsmerge::decode`'s arguments, but the new token overwrites slot seen % S and attention is plain over all S.

    The group's query heads are the rows of one SDPA call, the fastest spelling measured on CPUs: K and V are read
    once per key/value head. query [B, H, 1, D] -> [B, H, 1, D].
    """
    state, seen, rule = State(*rest[:9]), rest[9], Rule(*rest[11:])
    batch, heads, _, dim = query.shape
    groups, slots = new_key.shape[1], state.key.shape[2]
    slot = (seen % slots)[:, None, None].expand(batch, groups, 1)
    put(state.key, slot, new_key)
    put(state.value, slot, new_value)
    grouped = query.reshape(batch, groups, heads // groups, dim)
    out = F.scaled_dot_product_attention(grouped, state.key, state.value, scale=rule.scale)
    return out.reshape(batch, heads, 1, dim)


PLAIN = Kernel("plain static attention (SDPA over all slots)", plain_step)
