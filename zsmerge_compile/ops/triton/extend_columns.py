# mypy: disable-error-code="no-untyped-def"
"""Prefill, second phase: the discounted attention that each slot and each new token received (eq. 5).

One program holds COLUMNS keys of a row and key/value head and lets the felt queries of all r heads pass by, so
nothing is added up by atomics: sum over heads and queries j of exp(logit - top_j) * share_j, where share_j is
decay**(n - 1 - j) over the query's sum of exponentials (`extend_rows`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from zsmerge_compile.ops.triton.common import dots


@triton.jit
def columns_kernel(
    query,  # [b, H, n, D], strides query_row, query_head, query_column, 1
    key,  # [b, G, n, D], strides key_row, key_head, key_column, 1
    slot_key,  # [b, G, S, D]
    slot_bias,  # [b, G, S] or [b, H, S] fp32, -inf where nothing is held; strides bias_row, bias_head, 1
    token_bias,  # [b, H, n] fp32, or None
    position,  # [b, G, S] int32
    seen,  # [b] int64
    pads,  # [b] int64
    tops,  # [b, H, n - first] fp32
    shares,  # [b, H, n - first] fp32, 0 for padding
    held,  # [b, G, S] fp32, written
    received,  # [b, G, n] fp32, written
    query_row,
    query_head,
    query_column,
    key_row,
    key_head,
    key_column,
    bias_row,
    bias_head,
    bias_group,  # heads that share a row of slot_bias
    heads,
    group,
    n,
    first,
    slots,
    window,
    scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    slot_blocks = tl.cdiv(slots, COLUMNS)
    blocks = slot_blocks + tl.cdiv(n, COLUMNS)
    block, pair = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    groups = heads // group
    row, kv_head = pair // groups, pair % groups
    pad = tl.load(pads + row).to(tl.int32)
    before = tl.load(seen + row).to(tl.int32)
    on_slots = block < slot_blocks
    d = tl.arange(0, DP)
    real_d = (d < D)[None, :]
    u = tl.where(on_slots, block, block - slot_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    earliest, latest = block * 0 + first, block * 0 + n
    slot_bias += row * bias_row
    if on_slots:
        inside = u < slots
        found = tl.load(slot_bias + kv_head * group // bias_group * bias_head + u, mask=inside, other=-float("inf"))
        there = found > -float("inf")  # the same for all heads of the group
        newest = tl.load(position + pair * slots + u, mask=inside, other=0)
        k = tl.load(slot_key + (pair * slots + u)[:, None] * D + d[None, :], mask=there[:, None] & real_d, other=0.0)
    else:
        inside = u < n
        there = inside & (u >= pad)
        newest = before + u - pad
        tokens = key + row * key_row + kv_head * key_head + u.to(tl.int64)[:, None] * key_column
        k = tl.load(tokens + d[None, :], mask=there[:, None] & real_d, other=0.0)
        start = tl.min(u, 0)
        earliest = tl.maximum(first, start)
        if HAS_WINDOW:
            latest = tl.minimum(n, start + COLUMNS + window - 1)

    mass = tl.zeros([COLUMNS], tl.float32)
    r = tl.arange(0, ROWS)
    for g in range(0, group):
        head = kv_head * group + g
        bias = tl.zeros([COLUMNS, 1], tl.float32)
        if on_slots:
            bias += tl.load(slot_bias + head // bias_group * bias_head + u, mask=there, other=0.0)[:, None]
        else:
            if HAS_BIAS:
                bias += tl.load(token_bias + (row * heads + head) * n + u, mask=there, other=0.0)[:, None]
        place = (row * heads + head) * (n - first) - first
        mine = query + row * query_row + head * query_head
        for start in tl.range(earliest, latest, ROWS, num_stages=STAGES):
            c = start + r
            real = (c < latest) & (c >= pad)
            rows = mine + (row * 0 + start) * query_column + (r * query_column)[:, None]
            q = tl.load(rows + d[None, :], mask=real[:, None] & real_d, other=0.0)
            top = tl.load(tops + place + c, mask=real, other=float("inf"))
            share = tl.load(shares + place + c, mask=real, other=0.0)
            logit = dots(k, tl.trans(q), INTERPRETED) * scale + bias
            at = before + c - pad
            visible = there[:, None] & real[None, :] & (on_slots | (newest[:, None] <= at[None, :]))
            if HAS_WINDOW:
                visible = visible & (at[None, :] - newest[:, None] < window)
            p = tl.exp(tl.where(visible, logit - top[None, :], -float("inf")))
            mass += tl.sum(p * share[None, :], 1)
    if on_slots:
        tl.store(held + pair * slots + u, mass, mask=inside)
    else:
        tl.store(received + pair * n + u, mass, mask=inside)
