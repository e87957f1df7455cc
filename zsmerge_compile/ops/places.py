"""Positions counted by place in the cache instead of by place in the text, where a policy says so (`Rule.places`).

    text     a token's position is its place in the text; queries and keys arrive rotated by the model itself
    cache    its place among the tokens that are held: sinks at 0, 1, ..., then the ring without a gap (StreamingLLM)
    lambda   its place in the text; a query sees the last L = ring size tokens and the sinks (LM-Infinite's mask)
    capped   as lambda, and a sink's distance is L (LM-Infinite)

For all but the first, queries and keys arrive before their rotation, and the context is the sinks, the oldest tokens.
Rotary attention depends on distances alone, so the ring needs no new rotation as it moves on: the key of token t is
kept rotated by t % L, and a query is rotated twice, for the slots of the current lap and for those of the lap before.
The few sinks are rotated to their places in every call. But for lambda, angles stay below L, the length of a prompt or
the budget, however long the text.

Shapes: b rows, H query heads, G key/value heads, r = H / G, t queries, n new tokens, S slots, C sinks, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zsmerge_compile.ops.state import Rule, State, alibi_bias

BOUNDED = ("cache", "capped")  # positions stay small however long the text
LAMBDA = ("lambda", "capped")
BLOCK_ROWS = 1024  # batch rows x heads x queries of one block


def turned(x: Tensor, angle: Tensor, rule: Rule) -> Tensor:
    """x [b, h, t, D] rotated to positions `angle` (broadcast to [b, h, t]); x itself in a model without rotations.

    Pairs are i and i + D/2. Cosines are taken in fp32 and rounded to x's dtype, as transformers does.
    """
    if rule.frequencies is None:
        return x
    turns = angle[..., None].float() * rule.frequencies
    cos, sin = ((f(turns) * rule.magnitude).to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def turned_again(x: Tensor, angle: Tensor, rule: Rule) -> Tensor:
    """A key that is rotated already, rotated further: `turned` without the factor."""
    return x if rule.frequencies is None else turned(x, angle, rule) / rule.magnitude


def kept(key: Tensor, position: Tensor, rule: Rule) -> Tensor:
    """New keys [b, G, n, D] as the cache keeps them; position [b, n] in the text."""
    return key if rule.places == "text" else turned(key, (position % _lap(rule))[:, None], rule)


def reach(rule: Rule) -> int | None:
    """Tokens that a query sees of those before it and itself, sinks aside; None: all."""
    if rule.places not in LAMBDA:
        return rule.window
    return _lap(rule) if rule.window is None else min(rule.window, _lap(rule))


class Held(NamedTuple):
    """What is held, for the queries of one call; `seen` [b] tokens were seen before it."""

    state: State
    seen: Tensor
    start: Tensor  # [b] position at which the current lap of the ring began
    gone: Tensor  # [b] tokens that no longer count
    context: Tensor  # [b, G, C, D] fp32 keys of the sinks, at their places, or not rotated ("capped")


def held(state: State, seen: Tensor, rule: Rule) -> Held:
    """Prepares what all queries of a call share."""
    lap, part = _lap(rule), _context(rule)
    position = state.position[:, :, part]
    angle = -(position % lap) if rule.places == "capped" else position - position % lap
    gone = (seen - (rule.proximity + rule.context)).clamp_min(0)
    gone = torch.zeros_like(gone) if rule.places == "lambda" else gone
    return Held(state, seen, seen - seen % lap, gone, turned_again(state.key[:, :, part].float(), angle, rule))


def slot_logits(query: Tensor, at: Tensor, had: Held, rule: Rule) -> Tensor:
    """Logits [b, G, r, t, S] (fp32, with biases, -inf where not seen) of queries [b, H, t, D] at positions [b, t]."""
    state, lap = had.state, _lap(rule)
    groups = state.key.shape[1]
    behind = at - had.start[:, None]
    now, before = (turned(query, angle[:, None], rule).unflatten(1, (groups, -1)) for angle in (behind, behind + lap))
    ring = state.key[:, :, None, :lap].to(query.dtype)
    this_lap = (state.position[:, :, :lap] >= had.start[:, None, None])[:, :, None, None]
    logits = torch.where(this_lap, (now @ ring.mT).float(), (before @ ring.mT).float())
    if rule.context:
        place = torch.full_like(at, lap) if rule.places == "capped" else at - had.gone[:, None]
        far = turned(query.float(), place[:, None], rule).unflatten(1, (groups, -1))
        logits = torch.cat([logits, far @ had.context[:, :, None].mT], -1)
    seen = sees(at, state, rule) & (state.weight > 0)[:, :, None]
    return (logits * rule.scale + slot_biases(at, had, rule)).masked_fill(~seen[:, :, None], -torch.inf)


def sees(at: Tensor, state: State, rule: Rule) -> Tensor:
    """Whether queries at positions `at` [b, t] reach the slots, sinks always: [b, G, t, S]."""
    limit = reach(rule)
    distance = at[:, None, :, None] - state.position[:, :, None]
    near = torch.ones_like(distance, dtype=torch.bool) if limit is None else distance < limit
    slot = torch.arange(state.position.shape[2], device=at.device)
    return near | (slot >= _lap(rule))


def slot_biases(at: Tensor, had: Held, rule: Rule) -> Tensor | float:
    """ALiBi of the slots at their places: [b, G, r, t, S]; 0.0 in a model without it."""
    if rule.slopes is None:
        return 0.0
    lap, position = _lap(rule), had.state.position
    groups = position.shape[1]
    gone = had.gone[:, None, None]
    ring = (position[:, :, :lap] - gone)[:, :, None].expand(-1, -1, at.shape[1], -1)
    sinks = position[:, :, _context(rule)][:, :, None].expand(-1, -1, at.shape[1], -1)
    if rule.places == "capped":
        sinks = (at - had.gone[:, None] - lap)[:, None, :, None].expand_as(sinks)
    place = torch.cat([ring, sinks], -1).float().repeat_interleave(rule.slopes.shape[0] // groups, 1)
    return alibi_bias(place, None, had.state.key.dtype, rule).unflatten(1, (groups, -1))


class New(NamedTuple):
    """The new tokens of one call: keys [b, G, n, D] rotated by column; and the sinks among them or still in the ring.

    Beyond the reach of other tokens sinks are still seen, so they stand a second time, as columns of their own.
    """

    key: Tensor
    column: Tensor  # [n]
    sink: Tensor  # [b, C] column of the sink, below the padding where it is held
    sink_key: Tensor  # [b, G, C, D] fp32, rotated ("lambda") or not ("capped")
    sink_value: Tensor  # [b, G, C, D]
    is_sink: Tensor  # [b, G, C]


def new(key: Tensor, value: Tensor, pads: Tensor, had: Held, rule: Rule) -> New:
    """Prepares the new keys."""
    n, count = key.shape[2], rule.context if rule.places in LAMBDA else 0
    column = torch.arange(n, device=key.device)
    number = torch.arange(count, device=key.device)  # position of the sink
    sink = (pads - had.seen)[:, None] + number
    comes = ((sink >= pads[:, None]) & (sink < n))[:, None]
    rows = sink.clamp(0, n - 1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    rotated = turned(key, column, rule)
    slot = number % _lap(rule)
    angle = -slot.expand_as(sink) if rule.places == "capped" else sink - slot
    in_ring = turned_again(had.state.key[:, :, slot].float(), angle[:, None], rule)
    sink_key = (key if rule.places == "capped" else rotated).gather(2, rows).float()
    is_held = (had.state.position[:, :, slot] == number) & (had.state.weight[:, :, slot] > 0)
    return New(
        rotated,
        column,
        sink,
        torch.where(comes[..., None], sink_key, in_ring),
        torch.where(comes[..., None], value.gather(2, rows), had.state.value[:, :, slot].to(value.dtype)),
        comes | is_held,
    )


def token_logits(query: Tensor, mine: Tensor, others: slice, pads: Tensor, had: Held, fresh: New, rule: Rule) -> Tensor:
    """Logits [b, G, r, t, C + u] of queries at columns `mine` [t] on the call's sinks and on its columns `others`.

    C is 0 for "cache". Padding is not seen.
    """
    groups, limit = fresh.key.shape[1], reach(rule)
    column = fresh.column[others]
    behind = mine[:, None] - column
    visible = behind >= 0 if limit is None else (behind >= 0) & (behind < limit)
    visible = (visible & (column >= pads[:, None])[:, None])[:, None, None]  # [b, 1, 1, t, u]
    turned_query = turned(query, mine, rule).unflatten(1, (groups, -1))
    near = (turned_query @ fresh.key[:, :, None, others].mT).float() * rule.scale
    start = (had.seen - pads - had.gone)[:, None]  # place of column 0
    dtype = had.state.key.dtype
    near = (near + _alibi(start + column, groups, dtype, rule)).masked_fill(~visible, -torch.inf)
    if fresh.sink.shape[1] == 0:
        return near
    lap = torch.full_like(mine, _lap(rule))
    capped = rule.places == "capped"
    far = turned(query.float(), lap if capped else mine, rule).unflatten(1, (groups, -1))
    far = far @ fresh.sink_key[:, :, None].mT * rule.scale
    bias = _alibi(start + (mine - lap if capped else fresh.sink), groups, dtype, rule)
    if capped and not isinstance(bias, float):
        bias = bias.mT  # [b, G, r, t, 1]
    reached = (mine[:, None] - fresh.sink[:, None] >= lap[:, None])[:, None] & fresh.is_sink[:, :, None]
    return torch.cat([(far + bias).masked_fill(~reached[:, :, None], -torch.inf), near], -1)


def attend(
    state: State, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, pads: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.attend`, in blocks of queries; the two attentions received are zeros, as sinks are kept by age."""
    n = query.shape[2]
    had = held(state, seen, rule)
    fresh = new(key, value, pads, had, rule)
    column, limit = fresh.column, reach(rule)
    at = (seen - pads)[:, None] + column
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    step = max(1, BLOCK_ROWS // (query.shape[0] * query.shape[1]))
    for start in range(0, n, step):
        stop = min(start + step, n)
        others = slice(0 if limit is None else max(0, start - limit + 1), stop)
        mine = column[start:stop]
        to_slots = slot_logits(query[:, :, start:stop], at[:, start:stop], had, rule)
        to_new = token_logits(query[:, :, start:stop], mine, others, pads, had, fresh, rule)
        attention = torch.softmax(torch.cat([to_slots, to_new], -1), -1)
        attention = attention.masked_fill((mine < pads[:, None])[:, None, None, :, None], 0.0)
        part = weighted(attention.to(value.dtype), state.value, fresh, value[:, :, others])
        out[:, :, start:stop] = part.to(query.dtype)
    zeros = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    return out, torch.zeros_like(state.score), zeros


def weighted(attention: Tensor, held_value: Tensor, fresh: New, value: Tensor) -> Tensor:
    """Values weighted by attention [b, G, r, t, S + C + u] on slots, sinks and columns: [b, H, t, D]."""
    slots, sinks = held_value.shape[2], fresh.sink.shape[1]
    values = torch.cat([held_value, fresh.sink_value, value], 2)
    assert attention.shape[-1] == slots + sinks + value.shape[2]
    return (attention @ values[:, :, None]).flatten(1, 2)


def step(
    state: State, query: Tensor, key: Tensor, value: Tensor, at: Tensor, is_new: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """As `decode.attend` at positions `at` [B, 1, 1]; the new token stands where `is_new` [B, G, S]."""
    seen, groups = at[:, 0, 0], key.shape[1]
    had = held(state, seen, rule)
    to_slots = slot_logits(query, seen[:, None], had, rule)[:, :, :, 0]
    grouped = query.unflatten(1, (groups, -1))[:, :, :, 0]
    to_new = (grouped.float() * key.float()).sum(-1, keepdim=True) * rule.scale * rule.magnitude**2
    to_new = to_new + _alibi_one(seen - had.gone, groups, state.key.dtype, rule)
    attention = torch.softmax(torch.cat([to_slots, to_new], -1), -1)
    on_slots, on_new = attention[..., :-1], attention[..., -1:]
    out = (on_slots.to(value.dtype) @ state.value).float() + on_new * value.float()
    return out.to(query.dtype).flatten(1, 2)[:, :, None], torch.where(is_new, on_new.sum(2), on_slots.sum(2))


def _alibi_one(place: Tensor, groups: int, dtype: torch.dtype, rule: Rule) -> Tensor | float:
    """ALiBi of one token per row, at `place` [b]: [b, G, r, 1]; 0.0 in a model without it."""
    bias = _alibi(place[:, None], groups, dtype, rule)
    return bias if isinstance(bias, float) else bias[..., 0]


def _alibi(place: Tensor, groups: int, dtype: torch.dtype, rule: Rule) -> Tensor | float:
    """ALiBi of tokens at `place` [b, u]: [b, G, r, 1, u]; 0.0 in a model without it."""
    if rule.slopes is None:
        return 0.0
    return alibi_bias(place[:, None].float(), None, dtype, rule).unflatten(1, (groups, -1))[:, :, :, None]


def _lap(rule: Rule) -> int:
    """Tokens after which the ring begins anew: its size."""
    return rule.proximity + 1


def _context(rule: Rule) -> slice:
    """The slots of the sinks."""
    return slice(_lap(rule), _lap(rule) + rule.context)
