"""What the cache keeps of n new tokens: the third part of the specification (Algorithm 1, eqs. 6 and 7).

The ring keeps the newest `proximity` tokens; those that left it join the context's candidates, of which the best
`context` scores stay (of equals the newer); the rest go to the residual in position order. Slots that the window has
passed are emptied first. Two policies merge otherwise: `ops/cam.py`, `ops/sets.py`.
Shapes: b rows, G key/value heads, n new tokens, S slots, R residual slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zsmerge_compile.ops import cam, sets
from zsmerge_compile.ops.state import Rule, State
from zsmerge_compile.ops.tokens import Tokens

NEVER = torch.iinfo(torch.int32).max


class Residual(NamedTuple):
    """The residual slots as fp32 masters."""

    key: Tensor  # [b, G, R, D]
    value: Tensor  # [b, G, R, D]
    weight: Tensor  # [b, G, R]
    score: Tensor  # [b, G, R]
    position: Tensor  # [b, G, R] int32, newest member
    mean: Tensor  # [b, G, R] mean position
    opened: Tensor  # [b, G, R] int32


def in_turn(residual: Residual, arrivals: Residual) -> Residual:
    """Absorb the arrivals, [b, G, n, ...], one by one."""
    for i in range(arrivals.weight.shape[2]):
        residual = absorb_one(residual, Residual(*(t[:, :, i : i + 1] for t in arrivals)))
    return residual


InTurn = Callable[[Residual, Residual], Residual]
Attention = tuple[Tensor, Tensor]  # received by the slots [b, G, S] and by the new tokens [b, G, n]


def fold(
    state: State,
    key: Tensor,
    value: Tensor,
    received: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    in_turn: InTurn = in_turn,
    attention: Attention | None = None,
) -> State:
    """Move n new tokens [b, G, n, D] with scores `received` [b, G, n] into the cache.

    `in_turn` may be a kernel that absorbs arrivals faster than the loop that specifies it; `attention` is what
    slots and new tokens received, which CaM looks at.
    """
    singles = rule.proximity + 1 + rule.context
    keys, values = (torch.cat([held[:, :, :singles], new], 2) for held, new in ((state.key, key), (state.value, value)))
    ring, context, victims, after = sort_out(state, keys, values, received, seen, pads, rule, attention)
    residual = absorb(open_residual(state, after, rule.expiry), victims, rule.merge, in_turn)
    return join(ring, context, residual, state.key.dtype)


class Sorted(NamedTuple):
    """Where the single tokens go, and the position of each row's next token."""

    ring: Tokens
    context: Tokens
    victims: Tokens  # oldest first
    after: Tensor  # [b, 1, 1] int32


def sort_out(
    state: State,
    keys: Tensor,
    values: Tensor,
    received: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    attention: Attention | None = None,
) -> Sorted:
    """Which of the state's ring and context tokens and the n new ones stay where.

    keys, values: [b, G, ring + context + n, *] of those tokens in this order, or whatever stands for them; `attention`
    as for `fold`.
    """
    groups, n, ring_size = keys.shape[1], received.shape[2], rule.proximity + 1
    column = torch.arange(n, device=keys.device)
    position = (seen[:, None] + column - pads[:, None]).to(torch.int32)
    real = (column >= pads[:, None]).float()
    singles = ring_size + rule.context
    tokens = Tokens(
        keys,
        values,
        torch.cat([state.weight[:, :, :singles], real[:, None].expand(-1, groups, -1)], 2),
        torch.cat([state.score[:, :, :singles], received], 2),
        torch.cat([state.position[:, :, :singles], position[:, None].expand(-1, groups, -1)], 2),
    )
    after = (seen + n - pads).to(torch.int32)[:, None, None]
    alive = (tokens.weight > 0) & in_window(tokens.position, after, rule.expiry)
    recent = alive & (tokens.position >= after - rule.proximity)
    ring = fill_ring(tokens, recent, ring_size)
    candidate = alive & ~recent
    if rule.sets is None:
        context, victims = choose_context(tokens, candidate, rule.context, n)
    else:
        context, victims = merge_context(tokens, candidate, n, rule)
    if rule.merged:
        assert attention is not None
        ring = cam.merge(ring, victims, attention, seen, pads, rule)
    return Sorted(ring, context, victims, after)


def in_window(newest: Tensor, after: Tensor, window: int | None) -> Tensor:
    """Whether a slot's newest member is still visible to the token at position `after`."""
    return torch.ones_like(newest, dtype=torch.bool) if window is None else after - newest < window


def fill_ring(tokens: Tokens, recent: Tensor, ring_size: int) -> Tokens:
    """Each recent token in ring slot position % ring_size."""
    slot = torch.where(recent, tokens.position.long() % ring_size, ring_size)
    source = torch.full((*slot.shape[:2], ring_size + 1), -1, device=slot.device, dtype=torch.long)
    source = source.scatter(2, slot, torch.arange(slot.shape[2], device=slot.device).expand_as(slot))[..., :ring_size]
    return tokens.take(source.clamp_min(0), source >= 0)


def choose_context(tokens: Tokens, candidate: Tensor, context: int, n: int) -> tuple[Tokens, Tokens]:
    """The best `context` candidates by score (of equals the newer stays), and the at most n victims, oldest first."""
    newest_first = tokens.position.argsort(dim=2, descending=True, stable=True)
    score = torch.where(candidate, tokens.score, -torch.inf).gather(2, newest_first)
    order = newest_first.gather(2, score.argsort(dim=2, descending=True, stable=True))
    kept, left = order[..., :context], order[..., context:]
    victim = torch.zeros_like(candidate).scatter(2, left, candidate.gather(2, left))
    by_age = torch.where(victim, tokens.position, NEVER).argsort(dim=2, stable=True)[..., :n]
    return tokens.take(kept, candidate.gather(2, kept)), tokens.take(by_age, victim.gather(2, by_age))


def merge_context(tokens: Tokens, candidate: Tensor, n: int, rule: Rule) -> tuple[Tokens, Tokens]:
    """The best `pinned` candidates by score, and the others merged in sets, one a slot; and n holes: no victims."""
    pinned, rest = choose_context(tokens, candidate, rule.pinned, tokens.weight.shape[2])
    merged = sets.merge(rest, rule.context - rule.pinned, rule)
    context = Tokens(*(torch.cat(pair, 2) for pair in zip(pinned, merged, strict=True)))
    victims = Tokens(*(t[:, :, :n] for t in rest))
    return context, victims._replace(weight=torch.zeros_like(victims.weight))


def open_residual(state: State, after: Tensor, window: int | None) -> Residual:
    """The state's residual slots, emptied where the window has passed their newest member."""
    first = state.weight.shape[2] - state.opened.shape[2]
    weight, score, position = (t[:, :, first:] for t in (state.weight, state.score, state.position))
    live = (weight > 0) & in_window(position, after, window)
    return Residual(
        state.residual_key,
        state.residual_value,
        torch.where(live, weight, 0.0),
        torch.where(live, score, 0.0),
        position,
        state.residual_position,
        state.opened,
    )


def absorb(residual: Residual, victims: Tokens, merge: str, in_turn: InTurn = in_turn) -> Residual:
    """Take in the victims (oldest first): one by one, or as the means of contiguous near-equal groups."""
    if residual.weight.shape[2] == 0:
        return residual
    arrivals = segments(victims, residual.weight.shape[2]) if merge == "segment" else singly(victims)
    if merge == "segment" and not bool((residual.weight > 0).any()):
        return opened_at_once(residual, arrivals)
    return in_turn(residual, arrivals)


def every(victims: Tokens) -> Residual:
    """Every victim, and every hole among them, as an arrival of its own."""
    key, value, weight, score, position = victims
    return Residual(key.float(), value.float(), weight, score, position, position.float(), position)


def singly(victims: Tokens) -> Residual:
    """Every victim as an arrival of its own."""
    longest = int((victims.weight > 0).sum(2).max()) if victims.weight.numel() else 0  # victims lie first
    return Residual(*(t[:, :, :longest] for t in every(victims)))


def segments(victims: Tokens, residual: int) -> Residual:
    """The m victims as g = min(m, residual) contiguous groups, the first m % g one larger; each as its mean."""
    m = (victims.weight > 0).sum(2, keepdim=True)  # [b, G, 1]
    groups = m.clamp(1, residual)
    size, larger = m // groups, m % groups
    rank = torch.arange(victims.weight.shape[2], device=m.device).expand_as(victims.weight)
    edge = larger * (size + 1)
    group = torch.where(rank < edge, rank // (size + 1), larger + (rank - edge) // size.clamp_min(1))
    group = group.clamp_max(residual - 1)

    def total(t: Tensor) -> Tensor:
        return torch.zeros(*m.shape[:2], residual, device=m.device).scatter_add(2, group, t)

    def mean(t: Tensor) -> Tensor:
        rows = group[..., None].expand(*group.shape, t.shape[-1])
        summed = torch.zeros(*m.shape[:2], residual, t.shape[-1], device=m.device)
        return summed.scatter_add(2, rows, t.float() * victims.weight[..., None]) / weight.clamp_min(1.0)[..., None]

    weight = total(victims.weight)
    newest = torch.zeros(*m.shape[:2], residual, dtype=torch.int32, device=m.device).scatter_reduce(
        2, group, torch.where(victims.weight > 0, victims.position, 0), "amax"
    )
    mean_position = total(victims.position * victims.weight) / weight.clamp_min(1.0)
    return Residual(mean(victims.key), mean(victims.value), weight, total(victims.score), newest, mean_position, newest)


def opened_at_once(residual: Residual, arrivals: Residual) -> Residual:
    """What opening a free slot for each of R arrivals in turn comes to where all R slots are free."""
    order = (
        residual.opened.amax(2, keepdim=True)
        + 1
        + torch.arange(arrivals.weight.shape[2], device=arrivals.weight.device)
    )
    comes = arrivals.weight > 0
    opened = torch.where(comes, order.to(torch.int32), residual.opened)
    return arrivals._replace(opened=opened)


def similarity(residual: Tensor, arrival: Tensor) -> Tensor:
    """Eq. 6's dot product of keys [b, G, R, D] with one key [b, G, 1, D]: [b, G, R]."""
    return (residual * arrival).sum(-1)


def absorb_one(residual: Residual, arrival: Residual) -> Residual:
    """Open a free residual slot, else merge into the one with the largest dot product (eqs. 6, 7; weight 0: nothing).

    `arrival` has one slot, [b, G, 1, ...]. Of equal dot products the slot opened first takes it.
    """
    free = residual.weight == 0
    affinity = similarity(residual.key, arrival.key).masked_fill(free, torch.inf)
    best = affinity == affinity.amax(2, keepdim=True)
    chosen = torch.where(best, residual.opened, NEVER).argmin(2, keepdim=True)
    slot = torch.arange(free.shape[2], device=free.device) == chosen
    here = slot & (arrival.weight > 0)
    total = torch.where(here, residual.weight + arrival.weight, 1.0)

    def running_mean(old: Tensor, new: Tensor) -> Tensor:
        extra = (1,) * (old.dim() - free.dim())
        w, a, s, h = (t.reshape(*t.shape, *extra) for t in (residual.weight, arrival.weight, total, here))
        return torch.where(h, (w * old + a * new) / s, old)

    opened = residual.opened.amax(2, keepdim=True) + 1
    return Residual(
        running_mean(residual.key, arrival.key),
        running_mean(residual.value, arrival.value),
        torch.where(here, total, residual.weight),
        torch.where(here, residual.score + arrival.score, residual.score),
        torch.where(
            here, torch.where(free, arrival.position, residual.position.maximum(arrival.position)), residual.position
        ),
        running_mean(residual.mean, arrival.mean),
        torch.where(here & free, opened, residual.opened),
    )


def join(ring: Tokens, context: Tokens, residual: Residual, dtype: torch.dtype) -> State:
    """The three parts as one state; residual slots show their masters, rounded."""
    return State(
        torch.cat([ring.key, context.key, residual.key.to(dtype)], 2),
        torch.cat([ring.value, context.value, residual.value.to(dtype)], 2),
        torch.cat([ring.weight, context.weight, residual.weight], 2),
        torch.cat([ring.score, context.score, residual.score], 2),
        torch.cat([ring.position, context.position, residual.position], 2),
        residual.key,
        residual.value,
        residual.mean,
        residual.opened,
    )
