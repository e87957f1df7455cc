# mypy: disable-error-code="no-untyped-def"
"""Prefill: tokens, or means of segments, merged into the residual slots one after the other (eqs. 6 and 7).

One program serves a row and key/value head: each arrival needs to know what the one before it did. Where the
masters' keys fit into registers they stay there (HELD); else each arrival reads them again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zsmerge_compile.ops.triton.common import NEVER
from zsmerge_compile.ops.triton.decode_settle import nearest_residual
from zsmerge_compile.ops.triton.extend_merge import row_of


@triton.jit
def nearest_held(key, keys, tokens, order, i, inside):
    """As `nearest_residual`, of keys [RP, D] in registers: index of the slot that takes the arrival."""
    affinity = tl.sum(keys * key[None, :], 1)
    affinity = tl.where(inside, tl.where(tokens == 0.0, float("inf"), affinity), -float("inf"))
    ties = inside & (affinity == tl.max(affinity, 0))
    first_opened = tl.min(tl.where(ties, order, NEVER), 0)
    index = tl.min(tl.where(ties & (order == first_opened), i, NEVER), 0)
    return tl.where(index == NEVER, 0, index)  # NaN has no nearest: stay inside the cache


@triton.jit
def absorb_kernel(
    index,  # [b, G, n] int64 names of the arrivals, oldest first; None: arrival i is row i of old_key, old_value
    count,  # [b, G] int32 how many there are
    weights,  # [b, G, n] fp32 tokens in each; None: single tokens
    scores,  # [b, G, n] fp32
    positions,  # [b, G, n] int32
    means,  # [b, G, n] fp32; None: the positions
    old_key, old_value,  # [b, G, slots, D]
    new_key, new_value,  # [b, G, n, D] with strides
    weight, score, position,  # [b, G, residual], changed
    residual_key, residual_value, mean, opened,  # as in `ops.state.State`, changed
    key_row, key_head, key_column, value_row, value_head, value_column, groups, slots, singles, n, residual,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Each arrival in turn opens a free slot, or joins the one with the largest dot product as a running mean."""
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // groups, pair % groups
    d, i = tl.arange(0, DP), tl.arange(0, RP)
    real, inside = d < D, i < residual
    new_key += row * key_row + head * key_head
    new_value += row * value_row + head * value_head
    old_key += pair * slots * D
    old_value += pair * slots * D
    weight += pair * residual
    score += pair * residual
    position += pair * residual
    mean += pair * residual
    opened += pair * residual
    residual_key += pair * residual * D
    residual_value += pair * residual * D
    if HELD:
        all_keys = residual_key + i[:, None] * D + d[None, :]
        wide = inside[:, None] & real[None, :]
        keys = tl.load(all_keys, mask=wide, other=0.0)
        tokens = tl.load(weight + i, mask=inside, other=1.0)
        order = tl.load(opened + i, mask=inside, other=-1)
        latest = tl.max(order, 0)
    for arrival in range(0, tl.load(count + pair)):
        at = pair * n + arrival
        if SINGLE:
            name = tl.load(index + at).to(tl.int32)
            key = tl.load(row_of(old_key, new_key, name, singles, key_column, D) + d, mask=real, other=0.0)
            value = tl.load(row_of(old_value, new_value, name, singles, value_column, D) + d, mask=real, other=0.0)
            key, value, extra = key.to(tl.float32), value.to(tl.float32), 1.0
            where = tl.load(positions + at).to(tl.float32)
        else:
            key = tl.load(old_key + arrival * D + d, mask=real, other=0.0)
            value = tl.load(old_value + arrival * D + d, mask=real, other=0.0)
            extra, where = tl.load(weights + at), tl.load(means + at)
        points, newest = tl.load(scores + at), tl.load(positions + at)
        if HELD:
            chosen = nearest_held(key, keys, tokens, order, i, inside)
            held = tl.sum(tl.where(i == chosen, tokens, 0.0), 0)
        else:
            chosen, latest = nearest_residual(key, weight, residual_key, opened, 0, residual, D, DP, BLOCK)
            held = tl.load(weight + chosen)
            own_order = tl.load(opened + chosen)
            own_key = tl.load(residual_key + chosen * D + d, mask=real, other=0.0)
        own_value = tl.load(residual_value + chosen * D + d, mask=real, other=0.0)
        own_score, own_position, own_mean = tl.load(score + chosen), tl.load(position + chosen), tl.load(mean + chosen)
        opens = held == 0.0
        share = extra / (held + extra)
        tl.debug_barrier()  # every thread has read the slot before one of them changes it
        merged = tl.where(opens, value, own_value + share * (value - own_value))
        tl.store(residual_value + chosen * D + d, merged, mask=real)
        tl.store(score + chosen, own_score + points)
        tl.store(position + chosen, tl.where(opens, newest, tl.maximum(own_position, newest)))
        tl.store(mean + chosen, tl.where(opens, where, own_mean + share * (where - own_mean)))
        if HELD:
            here = i == chosen
            keys = tl.where(here[:, None], tl.where(opens, key[None, :], keys + share * (key[None, :] - keys)), keys)
            tokens = tl.where(here, held + extra, tokens)
            latest += opens.to(tl.int32)
            order = tl.where(here, tl.where(opens, latest, order), order)
        else:
            tl.store(residual_key + chosen * D + d, tl.where(opens, key, own_key + share * (key - own_key)), mask=real)
            tl.store(weight + chosen, held + extra)
            tl.store(opened + chosen, tl.where(opens, latest + 1, own_order))
        tl.debug_barrier()  # ... and the changes are there before the next arrival looks
    if HELD:
        tl.store(all_keys, keys, mask=wide)
        tl.store(weight + i, tokens, mask=inside)
        tl.store(opened + i, order, mask=inside)
