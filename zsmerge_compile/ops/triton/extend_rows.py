# mypy: disable-error-code="no-untyped-def"
"""Prefill, first phase: each new token's attention over the slots and the new tokens up to itself (eq. 8).

Flash style: keys pass by in blocks, and no buffer is as long as queries times keys. One program serves one query head
and ROWS queries; a group's heads find its keys in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zsmerge_compile.ops.triton.common import as_type, dots


@triton.jit
def add_block(top, total, out, q, k, value_rows, wide, bias, seen, scale, OUT: tl.constexpr, INTERPRETED: tl.constexpr):
    """One block of keys k [COLUMNS, D] joins a running softmax; seen [ROWS, COLUMNS] says who sees what."""
    logit = tl.where(seen, dots(q, tl.trans(k), INTERPRETED) * scale + bias, -float("inf"))
    higher = tl.maximum(top, tl.max(logit, 1))
    origin = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp(logit - origin[:, None])
    shrink = tl.exp(top - origin)
    total = total * shrink + tl.sum(p, 1)
    if OUT:
        v = tl.load(value_rows, mask=wide, other=0.0)
        out = out * shrink[:, None] + dots(as_type(p, v.dtype, INTERPRETED), v, INTERPRETED)
    return higher, total, out


@triton.jit
def rows_kernel(
    query,  # [b, H, n, D], strides query_row, query_head, query_column, 1
    key,  # [b, G, n, D], strides key_row, key_head, key_column, 1
    value,  # [b, G, n, D], strides value_row, value_head, value_column, 1
    slot_key,  # [b, G, S, D]
    slot_value,  # [b, G, S, D]
    slot_bias,  # [b, G, S] or [b, H, S] fp32, -inf where nothing is held; strides bias_row, bias_head, 1
    token_bias,  # [b, H, n] fp32, or None
    position,  # [b, G, S] int32
    seen,  # [b] int64
    pads,  # [b] int64
    out,  # [b, H, n, D] written from column `first` on, if OUT
    tops,  # [b, H, n - first] fp32, written: a query's largest logit, +inf for padding
    totals,  # [b, H, n - first] fp32, written: its sum of exponentials, 0 for padding
    query_row,
    query_head,
    query_column,
    key_row,
    key_head,
    key_column,
    value_row,
    value_head,
    value_column,
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
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    blocks = tl.cdiv(n - first, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest first
    row_head = tl.program_id(0) // blocks
    row, head = (row_head // heads).to(tl.int64), (row_head % heads).to(tl.int64)
    kv_head = head // group
    pad = tl.load(pads + row).to(tl.int32)
    before = tl.load(seen + row).to(tl.int32)
    d = tl.arange(0, DP)
    real_d = (d < D)[None, :]
    low = first + block * ROWS
    c = low + tl.arange(0, ROWS)
    real = (c >= pad) & (c < n)
    at = before + c - pad
    query += row * query_row + head * query_head
    q = tl.load(query + c.to(tl.int64)[:, None] * query_column + d[None, :], mask=real[:, None] & real_d, other=0.0)
    key += row * key_row + kv_head * key_head
    value += row * value_row + kv_head * value_head
    pair = row * (heads // group) + kv_head
    slot_key += pair * slots * D
    slot_value += pair * slots * D
    slot_bias += row * bias_row + (head // bias_group) * bias_head
    position += pair * slots

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DP], tl.float32)
    u = tl.arange(0, COLUMNS)
    for start in tl.range(0, slots, COLUMNS, num_stages=STAGES):
        s = start + u
        bias = tl.load(slot_bias + s, mask=s < slots, other=-float("inf"))
        live = bias > -float("inf")
        visible = real[:, None] & live[None, :]
        if HAS_WINDOW:
            newest = tl.load(position + s, mask=s < slots, other=0)
            visible = visible & (at[:, None] - newest[None, :] < window)
        wide = live[:, None] & real_d
        k = tl.load(slot_key + start * D + (u * D)[:, None] + d[None, :], mask=wide, other=0.0)
        rows = slot_value + start * D + (u * D)[:, None] + d[None, :]
        bias = tl.where(live, bias, 0.0)[None, :]
        top, total, sums = add_block(top, total, sums, q, k, rows, wide, bias, visible, scale, OUT, INTERPRETED)

    oldest = pad
    if HAS_WINDOW:
        oldest = tl.maximum(pad, low - window + 1)
    for start in tl.range(oldest // COLUMNS * COLUMNS, tl.minimum(low + ROWS, n), COLUMNS, num_stages=STAGES):
        s = start + u
        there = (s >= pad) & (s < n)
        visible = real[:, None] & there[None, :] & (c[:, None] >= s[None, :])
        if HAS_WINDOW:
            visible = visible & (c[:, None] - s[None, :] < window)
        wide = there[:, None] & real_d
        far = row * 0 + start  # in int64
        k = tl.load(key + far * key_column + (u * key_column)[:, None] + d[None, :], mask=wide, other=0.0)
        rows = value + far * value_column + (u * value_column)[:, None] + d[None, :]
        bias = tl.zeros([1, COLUMNS], tl.float32)
        if HAS_BIAS:
            bias += tl.load(token_bias + (row * heads + head) * n + s, mask=there, other=0.0)[None, :]
        top, total, sums = add_block(top, total, sums, q, k, rows, wide, bias, visible, scale, OUT, INTERPRETED)

    place = (row * heads + head) * (n - first) + c - first
    tl.store(tops + place, tl.where(real, top, float("inf")), mask=c < n)
    tl.store(totals + place, tl.where(real, total, 0.0), mask=c < n)
    if OUT:
        result = tl.where(real[:, None], sums / tl.where(real, total, 1.0)[:, None], 0.0)
        target = out + ((row * heads + head) * n + c)[:, None] * D + d[None, :]
        tl.store(target, as_type(result, out.dtype.element_ty, INTERPRETED), mask=(c < n)[:, None] & real_d)
