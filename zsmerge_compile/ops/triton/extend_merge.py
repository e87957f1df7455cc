# mypy: disable-error-code="no-untyped-def"
"""Prefill: the tokens that keep a slot of their own, and the means of the segments of those that don't.

A token is named by an index into its head's single slots, then the new tokens: below `singles` it is a slot of the
old cache, from there on a new token. K and V are fetched by that name, so they are never concatenated or sorted.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(old, new, index, singles, column_stride, D: tl.constexpr):
    """Where the rows of tokens `index` begin: in old [S, D] or new [n, D]."""
    far = (index - singles).to(tl.int64) * column_stride
    return tl.where(index < singles, old + index * D, new + far)


@triton.jit
def gather_kernel(
    index,  # [b, G, m] int64 names of tokens
    old_key, old_value,  # [b, G, S, D]
    new_key, new_value,  # [b, G, n, D] with strides
    key, value,  # [b, G, slots, D], rows 0 to m - 1 of each head written
    key_row, key_head, key_column, value_row, value_head, value_column, groups, slots, singles, m,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """key, value[pair, i] = those of the token index[pair, i]."""
    blocks = tl.cdiv(m, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    row, head = pair // groups, pair % groups
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DP)
    wide = (i < m)[:, None] & (d < D)[None, :]
    name = tl.load(index + pair * m + i, mask=i < m, other=0).to(tl.int32)
    target = (pair * slots + i)[:, None] * D + d[None, :]
    base = pair * slots * D
    keys = row_of(old_key + base, new_key + row * key_row + head * key_head, name, singles, key_column, D)
    tl.store(key + target, tl.load(keys[:, None] + d[None, :], mask=wide, other=0.0), mask=wide)
    values = row_of(old_value + base, new_value + row * value_row + head * value_head, name, singles, value_column, D)
    tl.store(value + target, tl.load(values[:, None] + d[None, :], mask=wide, other=0.0), mask=wide)


@triton.jit
def segments_kernel(
    index,  # [b, G, n] int64 names of the victims, oldest first
    count,  # [b, G] int32 how many there are
    scores,  # [b, G, n] fp32
    positions,  # [b, G, n] int32
    old_key, old_value,  # [b, G, S, D]
    new_key, new_value,  # [b, G, n, D] with strides
    key, value,  # [b, G, residual, D] fp32, written: the groups' means
    weight, score, mean,  # [b, G, residual] fp32, written: members, sum of scores, mean position
    newest,  # [b, G, residual] int32, written
    key_row, key_head, key_column, value_row, value_head, value_column, groups, slots, singles, n, residual,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The victims as min(count, residual) contiguous groups, the first ones larger by one; one program for each."""
    pair = (tl.program_id(0) // residual).to(tl.int64)
    segment = tl.program_id(0) % residual
    row, head = pair // groups, pair % groups
    victims = tl.load(count + pair)
    filled = tl.maximum(tl.minimum(victims, residual), 1)
    size, larger = victims // filled, victims % filled
    members = tl.where(segment < filled, size + (segment < larger).to(tl.int32), 0)
    start = segment * size + tl.minimum(segment, larger)
    d = tl.arange(0, DP)
    base = pair * slots * D
    first_key, first_value = new_key + row * key_row + head * key_head, new_value + row * value_row + head * value_head
    keys, values = tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32)
    points, places = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    last = tl.zeros([BLOCK], tl.int32)
    for member in range(0, members, BLOCK):
        i = member + tl.arange(0, BLOCK)
        there = i < members
        at = pair * n + start + i
        name = tl.load(index + at, mask=there, other=0).to(tl.int32)
        wide = there[:, None] & (d < D)[None, :]
        source = row_of(old_key + base, first_key, name, singles, key_column, D)
        keys += tl.sum(tl.load(source[:, None] + d[None, :], mask=wide, other=0.0).to(tl.float32), 0)
        source = row_of(old_value + base, first_value, name, singles, value_column, D)
        values += tl.sum(tl.load(source[:, None] + d[None, :], mask=wide, other=0.0).to(tl.float32), 0)
        points += tl.load(scores + at, mask=there, other=0.0)
        position = tl.load(positions + at, mask=there, other=0)
        places += position.to(tl.float32)
        last = tl.maximum(last, position)
    share = 1.0 / tl.maximum(members, 1).to(tl.float32)
    here = pair * residual + segment
    tl.store(key + here * D + d, keys * share, mask=d < D)
    tl.store(value + here * D + d, values * share, mask=d < D)
    tl.store(weight + here, members.to(tl.float32))
    tl.store(score + here, tl.sum(points, 0))
    tl.store(mean + here, tl.sum(places, 0) * share)
    tl.store(newest + here, tl.max(last, 0))
