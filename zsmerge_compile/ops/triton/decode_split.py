# mypy: disable-error-code="no-untyped-def"
"""Decode, first kernel: attention of one new token over the slots, cut into splits (eq. 8).

Grid (B * G * shares, splits). One program serves the r query heads of a row and key/value head over `chunk` slots, so
that K and V are read exactly once; of groups beyond HEADS heads it serves a share, whose neighbours find K and V in
the L2 cache. It leaves, in fp32, the biased logits and each split's largest logit, sum of exponentials and unnormalised
output; `decode_finish` joins them. Slots that are not live are masked out of the loads, so a block that holds none
costs no memory traffic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zsmerge_compile.ops.triton.common import alibi, as_type, dots


@triton.jit
def one_head(q, k, v, live, bias, scale, top, total, out):
    """One block of slots joins the running softmax of a single query head: q, out [D], logits [BLOCK].

    Sums of products instead of `tl.dot`, which would multiply fifteen rows of padding and want K and V in another
    layout than the loads'. All is one-dimensional for the layout's sake, too.
    """
    logit = tl.where(live, tl.sum(q[None, :] * k.to(tl.float32), 1) * scale + bias, -float("inf"))
    higher = tl.maximum(top, tl.max(logit, 0))
    origin = tl.where(higher == -float("inf"), 0.0, higher)  # nothing live so far
    p = tl.exp(logit - origin)
    shrink = tl.exp(top - origin)
    return logit, higher, total * shrink + tl.sum(p, 0), out * shrink + tl.sum(p[:, None] * v.to(tl.float32), 0)


@triton.jit
def many_heads(q, k, v, live, bias, scale, top, total, out, INTERPRETED: tl.constexpr):
    """The same for a group of query heads: q, out [r, D], logits [r, BLOCK]."""
    product = dots(q, tl.trans(k), INTERPRETED) * scale + bias
    logit = tl.where(live[None, :], product, -float("inf"))
    higher = tl.maximum(top, tl.max(logit, 1))
    origin = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp(logit - origin[:, None])
    shrink = tl.exp(top - origin)
    part = dots(as_type(p, v.dtype, INTERPRETED), v, INTERPRETED)
    return logit, higher, total * shrink + tl.sum(p, 1), out * shrink[:, None] + part


@triton.jit
def split_kernel(
    query,  # [B, H, 1, D], strides query_row, query_head, 1
    new_key,  # [B, G, 1, D], strides key_row, key_head, 1
    new_value,  # [B, G, 1, D], strides value_row, value_head, 1
    key,  # [B, G, S, D]
    value,  # [B, G, S, D]
    weight,  # [B, G, S] fp32
    position,  # [B, G, S] int32; read only with a window or ALiBi
    mean,  # [B, G, residual] fp32 mean positions; read only with ALiBi
    slopes,  # [H] fp32, or None
    seen,  # [B] int64
    active,  # [B] uint8
    logits,  # [B, G, r, padded] fp32, written
    part_max,  # [B, G, r, splits] fp32, written
    part_sum,  # [B, G, r, splits] fp32, written
    part_out,  # [B, G, r, splits, D] fp32, written
    tickets,  # [B, G] int32, zeroed here for `decode_finish`
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    groups,
    slots,
    residual,
    ring,
    window,
    chunk,
    padded,
    alpha,
    scale,
    divisor,
    R: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of one program, a power of two
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two, at least 16
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    BRANCH: tl.constexpr,  # jump over blocks without a live slot, at the cost of the loop's pipelining
    HAS_WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    ALIBI_BF16: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    shares = (R + HEADS - 1) // HEADS
    pair, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    split, splits = tl.program_id(1), tl.num_programs(1)
    row, head = pair // groups, pair % groups
    if (split == 0) & (share == 0):
        tl.store(tickets + pair, 0)
    if tl.load(active + row) == 0:
        return
    at = tl.load(seen + row).to(tl.int32)
    entering = at % ring
    d = tl.arange(0, DP)
    real_d = d < D
    pair64, row64, head64 = pair.to(tl.int64), row.to(tl.int64), head.to(tl.int64)
    query += row64 * query_row + head64 * R * query_head
    new_key += row64 * key_row + head64 * key_head
    new_value += row64 * value_row + head64 * value_head
    key += pair64 * slots * D
    value += pair64 * slots * D
    weight += pair64 * slots
    position += pair64 * slots
    logits += pair64 * R * padded
    if R == 1:
        q = tl.load(query + d, mask=real_d, other=0.0).to(tl.float32)
        top, total = tl.full([], -float("inf"), tl.float32), tl.full([], 0.0, tl.float32)
        out = tl.zeros([DP], tl.float32)
    else:
        g = share * HEADS + tl.arange(0, HEADS)
        real_g = g < R
        heads = query + g[:, None] * query_head
        q = tl.load(heads + d[None, :], mask=real_g[:, None] & real_d[None, :], other=0.0)
        top, total = tl.full([HEADS], -float("inf"), tl.float32), tl.zeros([HEADS], tl.float32)
        out = tl.zeros([HEADS, DP], tl.float32)
    if ALIBI:
        mean += pair64 * residual
        if R == 1:  # noqa: SIM108  # settled when the kernel is compiled
            slope = tl.load(slopes + head)
        else:
            slope = tl.load(slopes + head * R + g, mask=real_g, other=0.0)[:, None]

    start = split * chunk
    stop = tl.minimum(start + chunk, slots)
    for block in tl.range(start, stop, BLOCK, num_stages=STAGES):
        s = block + tl.arange(0, BLOCK)
        inside = s < stop
        is_new = s == entering
        held = tl.where(is_new, 1.0, tl.load(weight + s, mask=inside, other=0.0))
        live = inside & (held > 0.0)
        bias = alpha * tl.log(tl.where(live, held, 1.0))
        if HAS_WINDOW or ALIBI:
            newest = tl.where(is_new, at, tl.load(position + s, mask=inside, other=0))
        if HAS_WINDOW:
            live = live & (at - newest < window)
        if ALIBI:
            merged = s - (slots - residual)
            known = inside & (merged >= 0)
            where = tl.where(known, tl.load(mean + merged, mask=known, other=0.0), newest.to(tl.float32))
            many = held > 1.0
            if R > 1:
                bias, where, many = bias[None, :], where[None, :], many[None, :]
            bias += alibi(slope, where, many, divisor, key.dtype.element_ty, ALIBI_BF16)
        elif R > 1:
            bias = bias[None, :]
        logit = tl.full([BLOCK] if R == 1 else [HEADS, BLOCK], -float("inf"), tl.float32)
        wanted = True
        if BRANCH:
            wanted = tl.max(live.to(tl.int32), 0) > 0
        if wanted:
            # the new token stands in its ring slot: that row of K and V is the new one; nothing else is read twice
            wide = live[:, None] & real_d[None, :]
            rows = tl.where(is_new[:, None], new_key, key + s[:, None] * D)
            k = tl.load(rows + d[None, :], mask=wide, other=0.0, eviction_policy="evict_first")
            rows = tl.where(is_new[:, None], new_value, value + s[:, None] * D)
            v = tl.load(rows + d[None, :], mask=wide, other=0.0, eviction_policy="evict_first")
            if R == 1:
                logit, top, total, out = one_head(q, k, v, live, bias, scale, top, total, out)
            else:
                logit, top, total, out = many_heads(q, k, v, live, bias, scale, top, total, out, INTERPRETED)
        if R == 1:
            tl.store(logits + s, logit, mask=inside)
        else:
            tl.store(logits + g[:, None] * padded + s[None, :], logit, mask=real_g[:, None] & inside[None, :])

    if R == 1:
        at_part = pair64 * splits + split
        tl.store(part_max + at_part, top)
        tl.store(part_sum + at_part, total)
        tl.store(part_out + at_part * D + d, out, mask=real_d)
    else:
        at_parts = (pair64 * R + g) * splits + split
        tl.store(part_max + at_parts, top, mask=real_g)
        tl.store(part_sum + at_parts, total, mask=real_g)
        tl.store(part_out + at_parts[:, None] * D + d[None, :], out, mask=real_g[:, None] & real_d[None, :])
