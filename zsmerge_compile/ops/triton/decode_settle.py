# mypy: disable-error-code="no-untyped-def"
"""The end of a decode step for one row and key/value head: at most one token leaves the ring, one is merged.

Runs in one program, after all tiles of `decode_finish`; what other programs wrote is read past the L1 cache (".cg").
Everything is read first, then a barrier, then everything is written: a slow thread must not read what a fast one has
already changed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zsmerge_compile.ops.triton.common import NEVER, as_type


@triton.jit
def lowest_context(low_score, low_position, low_slot, tiles, ring, context, TP: tl.constexpr):
    """Score and slot of the context's lowest score (ties: the oldest token, then the first slot)."""
    n = tl.arange(0, TP)
    scores = tl.load(low_score + n, mask=n < tiles, other=float("inf"), cache_modifier=".cg")
    positions = tl.load(low_position + n, mask=n < tiles, other=NEVER, cache_modifier=".cg")
    slots = tl.load(low_slot + n, mask=n < tiles, other=NEVER, cache_modifier=".cg")
    lowest = tl.min(scores, 0)
    ties = scores == lowest
    oldest = tl.min(tl.where(ties, positions, NEVER), 0)
    slot = tl.min(tl.where(ties & (positions == oldest), slots, NEVER), 0)
    return lowest, tl.minimum(slot, ring + context - 1)  # NaN scores leave no winner: stay inside the cache


@triton.jit
def nearest_residual(
    victim_key, weight, residual_key, opened, first, residual, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr
):
    """The residual slot that takes the victim (a free one, else the largest dot product; ties: opened first).

    Returns its index and the highest order in which any slot was opened.
    """
    d = tl.arange(0, DP)
    best, best_order = tl.full([], -float("inf"), tl.float32), tl.full([], NEVER, tl.int32)
    chosen, latest = tl.full([], 0, tl.int32), tl.full([], -1, tl.int32)
    for start in range(0, residual, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < residual
        held = tl.load(weight + first + i, mask=inside, other=1.0, cache_modifier=".cg")
        order = tl.load(opened + i, mask=inside, other=-1)
        wide = inside[:, None] & (d < D)[None, :]
        masters = tl.load(residual_key + i[:, None] * D + d[None, :], mask=wide, other=0.0)
        affinity = tl.sum(masters * victim_key[None, :], 1)
        affinity = tl.where(held == 0.0, float("inf"), affinity)
        top = tl.max(tl.where(inside, affinity, -float("inf")), 0)
        ties = inside & (affinity == top)
        first_opened = tl.min(tl.where(ties, order, NEVER), 0)
        index = tl.min(tl.where(ties & (order == first_opened), i, NEVER), 0)
        better = (top > best) | ((top == best) & (first_opened < best_order))
        best = tl.where(better, top, best)
        best_order = tl.where(better, first_opened, best_order)
        chosen = tl.where(better, index, chosen)
        latest = tl.maximum(latest, tl.max(order, 0))
    return chosen, latest


@triton.jit
def settle(
    low_score, low_position, low_slot,  # [tiles]
    new_key, new_value,  # [D]
    key, value,  # [S, D]
    weight, score, position,  # [S], this step's scores, the window already applied
    residual_key, residual_value,  # [residual, D]
    mean, opened,  # [residual]
    at, slots, residual, ring, context, tiles,
    D: tl.constexpr, DP: tl.constexpr, TP: tl.constexpr, RESIDUAL_BLOCK: tl.constexpr,
    HAS_CONTEXT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the new token; the ring's oldest takes the context's lowest place if it beats it; merge who is left."""
    d = tl.arange(0, DP)
    real = d < D
    entering, leaving = at % ring, (at + 1) % ring  # leaving: the token at - proximity
    leaves = tl.load(weight + leaving, cache_modifier=".cg") > 0.0
    points = tl.load(score + leaving, cache_modifier=".cg")
    newest = tl.load(position + leaving, cache_modifier=".cg")
    entry_key = tl.load(new_key + d, mask=real, other=0.0)
    entry_value = tl.load(new_value + d, mask=real, other=0.0)
    out_key = tl.load(key + leaving * D + d, mask=real, other=0.0)
    out_value = tl.load(value + leaving * D + d, mask=real, other=0.0)

    promoted = leaves & False
    place = leaving
    victim_key, victim_value = out_key.to(tl.float32), out_value.to(tl.float32)
    victim_weight, victim_score, victim_position = leaves.to(tl.float32), points, newest
    if HAS_CONTEXT:
        lowest, place = lowest_context(low_score, low_position, low_slot, tiles, ring, context, TP)
        promoted = leaves & (lowest <= points)
        if promoted:
            victim_key = tl.load(key + place * D + d, mask=real, other=0.0).to(tl.float32)
            victim_value = tl.load(value + place * D + d, mask=real, other=0.0).to(tl.float32)
            victim_weight = tl.load(weight + place, cache_modifier=".cg")
            victim_score = tl.load(score + place, cache_modifier=".cg")
            victim_position = tl.load(position + place, cache_modifier=".cg")

    merges = leaves & (victim_weight > 0.0)
    if HAS_RESIDUAL:  # noqa: SIM102  # settled when the kernel is compiled, the inner one when it runs
        if merges:
            first = slots - residual
            chosen, latest = nearest_residual(
                victim_key, weight, residual_key, opened, first, residual, D, DP, RESIDUAL_BLOCK
            )
            slot = first + chosen
            held = tl.load(weight + slot, cache_modifier=".cg")
            own_score = tl.load(score + slot, cache_modifier=".cg")
            own_position = tl.load(position + slot, cache_modifier=".cg")
            own_mean = tl.load(mean + chosen)
            own_order = tl.load(opened + chosen)
            own_key = tl.load(residual_key + chosen * D + d, mask=real, other=0.0)
            own_value = tl.load(residual_value + chosen * D + d, mask=real, other=0.0)
            opens = held == 0.0
            share = 1.0 / (held + 1.0)
            merged_key = tl.where(opens, victim_key, own_key + share * (victim_key - own_key))
            merged_value = tl.where(opens, victim_value, own_value + share * (victim_value - own_value))
            where = victim_position.to(tl.float32)
            tl.debug_barrier()
            tl.store(residual_key + chosen * D + d, merged_key, mask=real)
            tl.store(residual_value + chosen * D + d, merged_value, mask=real)
            tl.store(key + slot * D + d, as_type(merged_key, key.dtype.element_ty, INTERPRETED), mask=real)
            tl.store(value + slot * D + d, as_type(merged_value, value.dtype.element_ty, INTERPRETED), mask=real)
            tl.store(mean + chosen, tl.where(opens, where, own_mean + share * (where - own_mean)))
            tl.store(opened + chosen, tl.where(opens, latest + 1, own_order))
            tl.store(weight + slot, held + 1.0)
            tl.store(score + slot, own_score + victim_score)
            tl.store(position + slot, tl.where(opens, victim_position, tl.maximum(own_position, victim_position)))
    tl.debug_barrier()
    tl.store(key + entering * D + d, entry_key, mask=real)
    tl.store(value + entering * D + d, entry_value, mask=real)
    if leaves:
        tl.store(weight + leaving, 0.0)
        tl.store(score + leaving, 0.0)
        if promoted:
            tl.store(key + place * D + d, out_key, mask=real)
            tl.store(value + place * D + d, out_value, mask=real)
            tl.store(weight + place, 1.0)
            tl.store(score + place, points)
            tl.store(position + place, newest)
