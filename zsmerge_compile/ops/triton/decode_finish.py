# mypy: disable-error-code="no-untyped-def"
"""Decode, second kernel: outputs, scores, and what the step evicts or merges (eqs. 5 to 7).

Grid (B * G, tiles). A program joins the splits' sums, writes its share of the outputs, updates the score of its tile
of slots, empties those that the window has passed and notes the tile's lowest context score. The last program of a
row and key/value head to finish (an atomic ticket) knows the lowest of all and moves the tokens: `decode_settle`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zsmerge_compile.ops.triton.common import NEVER, as_type
from zsmerge_compile.ops.triton.decode_settle import settle


@triton.jit
def write_outputs(
    out, part_max, part_sum, part_out, pair, tile, tiles, splits, R: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, SP: tl.constexpr, SB: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out[pair, g] = sum over splits of exp(max - top) * part / total, for the heads g = tile, tile + tiles, ..."""
    d, n = tl.arange(0, DP), tl.arange(0, SP)
    for g in range(tile, R, tiles):
        base = (pair * R + g) * splits
        highest = tl.load(part_max + base + n, mask=n < splits, other=-float("inf"))
        top = tl.max(highest, 0)
        total = tl.sum(tl.load(part_sum + base + n, mask=n < splits, other=0.0) * tl.exp(highest - top), 0)
        joined = tl.zeros([DP], tl.float32)
        for start in range(0, splits, SB):
            m = start + tl.arange(0, SB)
            share = tl.exp(tl.load(part_max + base + m, mask=m < splits, other=-float("inf")) - top)
            wide = (m < splits)[:, None] & (d < D)[None, :]
            part = tl.load(part_out + (base + m)[:, None] * D + d[None, :], mask=wide, other=0.0)
            joined += tl.sum(part * share[:, None], 0)
        joined = joined / total
        tl.store(out + (pair * R + g) * D + d, as_type(joined, out.dtype.element_ty, INTERPRETED), mask=d < D)


@triton.jit
def attention_mass(
    logits, part_max, part_sum, pair, s, slots, splits, padded, R: tl.constexpr, RB: tl.constexpr,
    TILE: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """The attention that slots s [TILE] receive from the group's r heads together, [TILE]."""
    mass = tl.zeros([TILE], tl.float32)
    n = tl.arange(0, SP)
    for start in range(0, R, RB):
        g = start + tl.arange(0, RB)
        real = g < R
        known = real[:, None] & (n < splits)[None, :]
        parts = (pair * R + g)[:, None] * splits + n[None, :]
        highest = tl.load(part_max + parts, mask=known, other=-float("inf"))
        top = tl.where(real, tl.max(highest, 1), 0.0)
        total = tl.sum(tl.load(part_sum + parts, mask=known, other=0.0) * tl.exp(highest - top[:, None]), 1)
        share = 1.0 / tl.where(real, total, 1.0)
        mask = real[:, None] & (s < slots)[None, :]
        logit = tl.load(logits + (pair * R + g)[:, None] * padded + s[None, :], mask=mask, other=-float("inf"))
        mass += tl.sum(tl.exp(logit - top[:, None]) * share[:, None], 0)
    return mass


@triton.jit
def finish_kernel(
    logits,  # [B, G, r, padded] fp32
    part_max,  # [B, G, r, splits] fp32
    part_sum,  # [B, G, r, splits] fp32
    part_out,  # [B, G, r, splits, D] fp32
    tickets,  # [B, G] int32, zero at the start
    low_score,  # [B, G, tiles] fp32 scratch: the tiles' lowest context scores ...
    low_position,  # [B, G, tiles] int32 ... and whose they are
    low_slot,  # [B, G, tiles] int32
    out,  # [B, H, 1, D] written
    new_key,  # [B, G, 1, D], strides key_row, key_head, 1
    new_value,  # [B, G, 1, D], strides value_row, value_head, 1
    key,  # the state, as in `ops.state.State`, all written
    value,
    weight,
    score,
    position,
    residual_key,
    residual_value,
    mean,
    opened,
    seen,  # [B] int64
    active,  # [B] uint8
    key_row,
    key_head,
    value_row,
    value_head,
    groups,
    slots,
    residual,
    ring,
    context,
    window,
    splits,
    padded,
    decay,
    R: tl.constexpr,
    RB: tl.constexpr,  # heads at a time
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    TP: tl.constexpr,  # tiles rounded up to a power of two
    SP: tl.constexpr,  # splits rounded up to a power of two
    SB: tl.constexpr,  # splits at a time
    RESIDUAL_BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SCORING: tl.constexpr,  # index in `supports.SCORINGS`
    INTERPRETED: tl.constexpr,
):
    pair, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, head = pair // groups, pair % groups
    pair64, row64, head64 = pair.to(tl.int64), row.to(tl.int64), head.to(tl.int64)
    if tl.load(active + row) == 0:  # the output is undefined; zeros cannot spread
        d = tl.arange(0, DP)
        for g in range(tile, R, tiles):
            tl.store(out + (pair64 * R + g) * D + d, tl.zeros([DP], out.dtype.element_ty), mask=d < D)
        return
    at = tl.load(seen + row).to(tl.int32)
    s = tile * TILE + tl.arange(0, TILE)
    inside = s < slots
    write_outputs(out, part_max, part_sum, part_out, pair64, tile, tiles, splits, R, D, DP, SP, SB, INTERPRETED)
    mass = attention_mass(logits, part_max, part_sum, pair64, s, slots, splits, padded, R, RB, TILE, SP)

    here = pair64 * slots + s
    is_new = s == at % ring
    held = tl.load(weight + here, mask=inside, other=0.0)
    newest = tl.load(position + here, mask=inside, other=0)
    before = tl.load(score + here, mask=inside, other=0.0)
    tl.debug_barrier()  # every thread has read its slots before one of them writes
    now = tl.where(is_new, 1.0, held)
    newest = tl.where(is_new, at, newest)
    if HAS_WINDOW:
        now = tl.where(at + 1 - newest < window, now, 0.0)
    if SCORING == 1:  # "age"
        points = -newest.to(tl.float32)
    elif SCORING == 2:  # "observed": a decoded token's is `scores.DECODED`
        points = tl.where(is_new, -1.0, before)
    else:
        points = tl.where(is_new, mass, before * decay + mass)
    points = tl.where(now > 0.0, points, 0.0)
    tl.store(score + here, points, mask=inside)
    tl.store(weight + here, now, mask=inside & (is_new | (now != held)))
    tl.store(position + here, newest, mask=inside & is_new)

    if HAS_CONTEXT:
        candidate = (s >= ring) & (s < ring + context)
        rank = tl.where(candidate, tl.where(now > 0.0, points, -float("inf")), float("inf"))
        lowest = tl.min(rank, 0)
        ties = candidate & (rank == lowest)
        oldest = tl.min(tl.where(ties, newest, NEVER), 0)
        at_tile = pair64 * tiles + tile
        tl.store(low_score + at_tile, lowest)
        tl.store(low_position + at_tile, oldest)
        tl.store(low_slot + at_tile, tl.min(tl.where(ties & (newest == oldest), s, NEVER), 0))

    # all the program's writes come before its ticket, and the last ticket before any read of them
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets + pair, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    if ticket == tiles - 1:
        settle(
            low_score + pair64 * tiles,
            low_position + pair64 * tiles,
            low_slot + pair64 * tiles,
            new_key + row64 * key_row + head64 * key_head,
            new_value + row64 * value_row + head64 * value_head,
            key + pair64 * slots * D,
            value + pair64 * slots * D,
            weight + pair64 * slots,
            score + pair64 * slots,
            position + pair64 * slots,
            residual_key + pair64 * residual * D,
            residual_value + pair64 * residual * D,
            mean + pair64 * residual,
            opened + pair64 * residual,
            at,
            slots,
            residual,
            ring,
            context,
            tiles,
            D,
            DP,
            TP,
            RESIDUAL_BLOCK,
            HAS_CONTEXT,
            HAS_RESIDUAL,
            INTERPRETED,
        )
