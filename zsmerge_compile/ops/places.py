"""Positions counted by place in the cache instead of by place in the text, where a policy says so (`Rule.places`).

    text     a token's position is its place in the text; queries and keys arrive rotated by the model itself
    cache    its place among the tokens that are held: sinks at 0, 1, ..., then the ring without a gap (StreamingLLM)
    lambda   its place in the text; a query sees the last L = ring size tokens and the sinks (LM-Infinite's mask)
    capped   as lambda, and a sink's distance is L (LM-Infinite)

For all but the first, queries and keys arrive before their rotation, and the context is the sinks, the oldest tokens.
Rotary attention depends on distances alone, and in all three those within the ring are the text's: keys are kept
rotated to their place in the text, and only the few sinks meet a query that is rotated to another place. Angles are
reduced in double precision, so they are exact however long the text.

Shapes: b rows, H query heads, G key/value heads, r = H / G, t queries, n new tokens, S slots, C sinks, D head dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from zsmerge_compile.ops.state import Rule, State, alibi_bias

BOUNDED = ("cache", "capped")  # a text has no last position
LAMBDA = ("lambda", "capped")
BLOCK_ROWS = 1024  # batch rows x heads x queries of one block


def turned(x: Tensor, position: Tensor, rule: Rule) -> Tensor:
    """x [b, h, t, D] rotated to `position` (broadcast to [b, h, t]); x itself in a model without rotations.

    Pairs are i and i + D/2. Cosines are taken in fp32 and rounded to x's dtype, as transformers does.
    """
    if rule.frequencies is None:
        return x
    turns = position[..., None].double() * (rule.frequencies.double() / (2 * math.pi))
    angle = (turns - turns.floor()).float() * (2 * math.pi)
    cos, sin = ((f(angle) * rule.magnitude).to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def kept(key: Tensor, position: Tensor, rule: Rule) -> Tensor:
    """New keys [b, G, n, D] as the cache keeps them; position [b, n] in the text."""
    return key if rule.places == "text" else turned(key, position[:, None], rule)


def reach(rule: Rule) -> int | None:
    """Tokens that a query sees of those before it and itself, sinks aside; None: all."""
    if rule.places not in LAMBDA:
        return rule.window
    limit = rule.proximity + 1
    return limit if rule.window is None else min(rule.window, limit)


class Held(NamedTuple):
    """What is held, for the queries of one call; `seen` [b] tokens were seen before it."""

    state: State
    seen: Tensor
    gone: Tensor  # [b] tokens that no longer count
    sinks: Tensor  # [b, G, C, D] fp32 keys of the context, rotated to their place, or not at all ("capped")


def held(state: State, seen: Tensor, rule: Rule) -> Held:
    """Prepares what all queries of a call share."""
    gone = (seen - (rule.proximity + rule.context)).clamp_min(0)
    gone = torch.zeros_like(gone) if rule.places == "lambda" else gone
    part = _context(rule)
    return Held(state, seen, gone, _as_sinks(state.key[:, :, part], state.position[:, :, part], rule))


def _as_sinks(key: Tensor, position: Tensor, rule: Rule) -> Tensor:
    """Kept keys of sinks [b, G, C, D] in fp32; for "capped" their rotation is undone."""
    if rule.places != "capped" or rule.frequencies is None:
        return key.to(torch.float32, copy=True)  # a loop in a graph may not see one memory twice
    return turned(key.float(), -position, rule) / rule.magnitude


def sink_place(at: Tensor, had: Held, rule: Rule) -> Tensor:
    """To where a query at `at` [b, t] is rotated for sinks: [b, t]."""
    return torch.full_like(at, rule.proximity + 1) if rule.places == "capped" else at - had.gone[:, None]


def sink_logits(query: Tensor, at: Tensor, sinks: Tensor, had: Held, rule: Rule) -> Tensor:
    """Logits [b, G, r, t, C] of queries [b, H, t, D], not rotated, on keys as `_as_sinks` gives them."""
    far = turned(query.float(), sink_place(at, had, rule)[:, None], rule).unflatten(1, (sinks.shape[1], -1))
    return far @ sinks[:, :, None].mT * rule.scale


def slot_logits(query: Tensor, at: Tensor, had: Held, rule: Rule) -> Tensor:
    """Logits [b, G, r, t, S] (fp32, with biases, -inf where not seen) of queries [b, H, t, D] at positions [b, t]."""
    state, part = had.state, _context(rule)
    near = turned(query, at[:, None], rule).unflatten(1, (state.key.shape[1], -1))
    logits = (near @ state.key[:, :, None, : part.start].to(query.dtype).mT).float() * rule.scale
    if rule.context:
        logits = torch.cat([logits, sink_logits(query, at, had.sinks, had, rule)], -1)
    seen = sees(at, state, rule) & (state.weight > 0)[:, :, None]
    return (logits + slot_biases(at, had, rule)).masked_fill(~seen[:, :, None], -torch.inf)


def sees(at: Tensor, state: State, rule: Rule) -> Tensor:
    """Whether queries at positions `at` [b, t] reach the slots, sinks always: [b, G, t, S]."""
    limit = reach(rule)
    distance = at[:, None, :, None] - state.position[:, :, None]
    near = torch.ones_like(distance, dtype=torch.bool) if limit is None else distance < limit
    return near | (torch.arange(state.position.shape[2], device=at.device) > rule.proximity)


def slot_biases(at: Tensor, had: Held, rule: Rule) -> Tensor | float:
    """ALiBi of the slots at their places: [b, G, r, t, S]; 0.0 in a model without it."""
    if rule.slopes is None:
        return 0.0
    position, part = had.state.position, _context(rule)
    gone, groups = had.gone[:, None, None], position.shape[1]
    ring = (position[:, :, : part.start] - gone)[:, :, None].expand(-1, -1, at.shape[1], -1)
    sinks = position[:, :, part][:, :, None].expand(-1, -1, at.shape[1], -1)
    if rule.places == "capped":
        sinks = (at - had.gone[:, None] - rule.proximity - 1)[:, None, :, None].expand_as(sinks)
    place = torch.cat([ring, sinks], -1).float().repeat_interleave(rule.slopes.shape[0] // groups, 1)
    return alibi_bias(place, None, had.state.key.dtype, rule).unflatten(1, (groups, -1))


class New(NamedTuple):
    """The new tokens of one call, keys [b, G, n, D] rotated; and the sinks among them or still in the ring.

    Beyond the reach of other tokens sinks are still seen, so they stand a second time, as columns of their own.
    """

    key: Tensor
    at: Tensor  # [b, n] positions
    sink: Tensor  # [C] positions of those sinks
    sink_key: Tensor  # [b, G, C, D] as `_as_sinks` gives them
    sink_value: Tensor  # [b, G, C, D]
    is_sink: Tensor  # [b, G, C]


def new(key: Tensor, value: Tensor, pads: Tensor, had: Held, rule: Rule) -> New:
    """Prepares the new keys."""
    n, count, state = key.shape[2], rule.context if rule.places in LAMBDA else 0, had.state
    first = had.seen - pads  # position of column 0
    at = first[:, None] + torch.arange(n, device=key.device)
    rotated = turned(key, at[:, None], rule)
    sink = torch.arange(count, device=key.device)
    column = sink - first[:, None]
    comes = ((column >= pads[:, None]) & (column < n))[:, None]
    rows = column.clamp(0, n - 1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    slot = sink % (rule.proximity + 1)
    is_held = (state.position[:, :, slot] == sink) & (state.weight[:, :, slot] > 0)
    taken = torch.where(comes[..., None], rotated.gather(2, rows), state.key[:, :, slot].to(key.dtype))
    values = torch.where(comes[..., None], value.gather(2, rows), state.value[:, :, slot].to(value.dtype))
    return New(rotated, at, sink, _as_sinks(taken, sink, rule), values, comes | is_held)


def token_logits(query: Tensor, at: Tensor, others: slice, had: Held, fresh: New, rule: Rule) -> Tensor:
    """Logits [b, G, r, t, C + u] of queries at positions `at` [b, t] on the call's sinks and on its columns `others`.

    C is 0 for "cache". Padding is not seen.
    """
    other, key = fresh.at[:, others], fresh.key[:, :, others]
    groups, limit, dtype = key.shape[1], reach(rule), had.state.key.dtype
    behind = at[:, :, None] - other[:, None]
    visible = behind >= 0 if limit is None else (behind >= 0) & (behind < limit)
    visible = (visible & (other >= had.seen[:, None])[:, None])[:, None, None]  # [b, 1, 1, t, u]
    near = turned(query, at[:, None], rule).unflatten(1, (groups, -1)) @ key[:, :, None].mT
    near = near.float() * rule.scale + _alibi(other - had.gone[:, None], groups, dtype, rule)
    near = near.masked_fill(~visible, -torch.inf)
    if fresh.sink.shape[0] == 0:
        return near
    far = sink_logits(query, at, fresh.sink_key, had, rule)
    if rule.slopes is not None:
        capped = rule.places == "capped"
        place = at - had.gone[:, None] - rule.proximity - 1 if capped else fresh.sink.expand(at.shape[0], -1)
        bias = _alibi(place, groups, dtype, rule)
        far = far + (bias.mT if capped and isinstance(bias, Tensor) else bias)
    reached = (at[:, :, None] - fresh.sink > rule.proximity)[:, None] & fresh.is_sink[:, :, None]
    return torch.cat([far.masked_fill(~reached[:, :, None], -torch.inf), near], -1)


def attend(
    state: State, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, pads: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.attend`, in blocks of queries; the two attentions received are zeros, as sinks are kept by age."""
    n, limit = query.shape[2], reach(rule)
    had = held(state, seen, rule)
    fresh = new(key, value, pads, had, rule)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    step = max(1, BLOCK_ROWS // (query.shape[0] * query.shape[1]))
    for start in range(0, n, step):
        mine = slice(start, min(start + step, n))
        others = slice(0 if limit is None else max(0, start - limit + 1), mine.stop)
        to_slots = slot_logits(query[:, :, mine], fresh.at[:, mine], had, rule)
        to_new = token_logits(query[:, :, mine], fresh.at[:, mine], others, had, fresh, rule)
        attention = torch.softmax(torch.cat([to_slots, to_new], -1), -1)
        attention = attention.masked_fill((fresh.at[:, mine] < seen[:, None])[:, None, None, :, None], 0.0)
        out[:, :, mine] = weighted(attention, state.value, fresh, value[:, :, others]).to(query.dtype)
    zeros = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    return out, torch.zeros_like(state.score), zeros


def weighted(attention: Tensor, held_value: Tensor, fresh: New, value: Tensor) -> Tensor:
    """Values weighted by attention [b, G, r, t, S + C + u] on slots, sinks and columns: [b, H, t, D]."""
    values = torch.cat([held_value, fresh.sink_value, value], 2)
    return (attention.to(value.dtype) @ values[:, :, None]).flatten(1, 2)


def step(
    state: State, query: Tensor, key: Tensor, at: Tensor, is_new: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """For one token per row at positions `at` [B, 1, 1], in the slot that `is_new` [B, G, S] tells: query and key
    rotated, and what makes of their logits those that count, [B, G, r, S] (-inf where not seen)."""
    place, part = at[:, 0].long(), _context(rule)
    had = held(state, place[:, 0], rule)
    groups = key.shape[1]
    rotated, own = turned(query, place[:, None], rule), turned(key, place[:, None], rule)
    seen = is_new | (sees(place, state, rule)[:, :, 0] & (state.weight > 0))
    bias = torch.zeros(*query.shape[:2], is_new.shape[2], device=query.device).unflatten(1, (groups, -1))
    if rule.slopes is not None:
        new_bias = _alibi(place - had.gone[:, None], groups, key.dtype, rule)
        assert isinstance(new_bias, Tensor)
        bias = torch.where(is_new[:, :, None], new_bias[..., 0], slot_biases(place, had, rule)[:, :, :, 0])  # type: ignore[index]
    if rule.context:
        far = sink_logits(query, place, had.sinks, had, rule)
        near = rotated.float().unflatten(1, (groups, -1)) @ state.key[:, :, None, part].float().mT * rule.scale
        bias = torch.cat([bias[..., : part.start], bias[..., part] + (far - near)[:, :, :, 0]], -1)
    return rotated, own, bias.masked_fill(~seen[:, :, None], -torch.inf)


def _alibi(place: Tensor, groups: int, dtype: torch.dtype, rule: Rule) -> Tensor | float:
    """ALiBi of tokens at `place` [b, u]: [b, G, r, 1, u]; 0.0 in a model without it."""
    if rule.slopes is None:
        return 0.0
    return alibi_bias(place[:, None].float(), None, dtype, rule).unflatten(1, (groups, -1))[:, :, :, None]


def _context(rule: Rule) -> slice:
    """The slots of the sinks."""
    return slice(rule.proximity + 1, rule.proximity + 1 + rule.context)
