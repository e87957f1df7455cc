"""The decode step as a compiler likes it: K and V are read once, and each buffer is written by one `index_put_`.

Equal to `reference.extend` with n = 1, but in place and with static shapes only. One step changes at most four
slots of a head: the ring slot of the new token, the ring slot of the token that leaves, the context slot it takes,
and one residual slot; and for CaM the values of some ring slots more. A move that does not happen writes a slot's old
content back. Concatenated indices keep it to one `index_put_` per buffer: Inductor re-inplaces that, and copies the
whole of K and V for anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zsmerge_compile.ops import cam, places, scores
from zsmerge_compile.ops.state import Rule, State, alibi_bias

NEVER = torch.iinfo(torch.int32).max


# More than slots is attended to: (query [b, H, t, D], logits [b, G, r, t, S], out [b, G, r, t, D] fp32) -> out, fp32
Blend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Moves(NamedTuple):
    """What one step changes, per row and key/value head: slot indices [B, G, 1] and conditions [B, G, 1]."""

    entering: Tensor  # ring slot of the new token
    leaving: Tensor  # ring slot of the token the new one pushes out
    leaves: Tensor  # bool: there is such a token
    place: Tensor | None  # context slot with the lowest score (or an empty one); None if context == 0
    promoted: Tensor  # bool: the leaving token takes `place`


def attend(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    entering: Tensor,
    rule: Rule,
    blend: Blend | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 8 over the live slots and the new token, which stands in its (empty) ring slot `entering` [B, G, 1].

    bias [B, G, 1 or r, S] is added to q.k * scale, -inf where a slot is not live. The group's query heads are the rows
    of one matrix product, so K and V are read once per key/value head and never widened. Returns out [B, H, 1, D] and
    the group's summed attention [B, G, S]. blend: see `Blend`.
    """
    batch, heads, _, dim = query.shape
    groups = key.shape[1]
    is_new = new_slot(state, entering)[:, :, None]
    grouped = query.reshape(batch, groups, heads // groups, dim)
    old = (grouped @ state.key.mT).float()  # [B, G, r, S]
    new = (grouped.float() * key.float()).sum(-1, keepdim=True)  # [B, G, r, 1]
    logits = torch.where(is_new, new, old) * rule.scale + bias
    attention = torch.softmax(logits, -1)
    on_slots = attention.masked_fill(is_new, 0.0)
    on_new = (attention * is_new).sum(-1, keepdim=True)
    out = (on_slots.to(value.dtype) @ state.value).float() + on_new * value.float()
    if blend is not None:
        out = blend(query, logits[:, :, :, None], out[:, :, :, None])[:, :, :, 0]
    return out.to(query.dtype).view(batch, heads, 1, dim), attention.sum(2)


Lost = Callable[[Tensor, Tensor, Tensor], None]  # key and value [B, G, 1, D] of a token, and where it leaves [B, G, 1]
Attend = Callable[[State, Tensor, Tensor, Tensor, Tensor, Tensor, Rule], tuple[Tensor, Tensor]]


def step(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    active: Tensor,
    rule: Rule,
    attend: Attend = attend,
    lost: Lost | None = None,
) -> Tensor:
    """One decode step, in place: query [B, H, 1, D], key and value [B, G, 1, D], seen [B], active bool [B].

    Returns out [B, H, 1, D]. Rows that are not active keep their state; their output is undefined. `attend` may be
    a kernel that is faster on one device; its default is plain aten, which every exporter knows. `lost` is called with
    the token that leaves.
    """
    at = seen.to(torch.int32)[:, None, None]  # [B, 1, 1] the new token's position
    alive_row = active[:, None, None]
    entering = (at % (rule.proximity + 1)).expand(-1, key.shape[1], -1).long()  # [B, G, 1]
    is_new = new_slot(state, entering)
    if rule.places == "text":
        bias = slot_bias(state, at, is_new, query.dtype, rule)
    else:
        query, key, bias = places.step(state, query, key, at, is_new, rule)
    out, mass = attend(state, query, key, value, bias, entering, rule)

    weight = torch.where(is_new, 1.0, state.weight)
    position = torch.where(is_new, at, state.position)
    score = scores.after_step(mass, state.score, weight, position, is_new, rule)
    if rule.expiry is not None:
        weight = torch.where(at + 1 - position < rule.expiry, weight, 0.0)
        score = torch.where(weight > 0, score, 0.0)
    moves = find_moves(weight, score, position, entering, at, rule)
    gift = cam.gift(mass, moves.leaving, moves.leaves & ~moves.promoted, at, rule) if rule.merged else None
    now = State(state.key, state.value, weight, score, position, *state[5:])
    if lost is not None:
        tell(lost, now, moves, alive_row)
    move(state, now, key, value, moves, alive_row, gift)
    return out


def new_slot(state: State, entering: Tensor) -> Tensor:
    """Which slot the new token stands in: [B, G, S] bool."""
    return torch.arange(state.weight.shape[2], device=entering.device) == entering


def slot_bias(state: State, at: Tensor, is_new: Tensor, dtype: torch.dtype, rule: Rule) -> Tensor:
    """What is added to q.k * scale (eq. 8): `biases`, and -inf where a slot is not live: [B, G, 1 or r, S]."""
    live = is_new | (state.weight > 0)
    if rule.window is not None:
        live = live & (is_new | (at - state.position < rule.window))
    return biases(state, at, is_new, dtype, rule).masked_fill(~live[:, :, None], -torch.inf)


def biases(state: State, at: Tensor, is_new: Tensor, dtype: torch.dtype, rule: Rule) -> Tensor:
    """alpha * log(weight) (0 at the new token), plus ALiBi where the model has it: [B, G, 1 or r, S]."""
    merged = state.weight > 1
    bias = rule.alpha * torch.where(merged, state.weight, 1.0).log()[:, :, None]
    if rule.slopes is None:
        return bias
    singles = state.position.shape[2] - state.residual_position.shape[2]
    mean = torch.cat([state.position[:, :, :singles].float(), state.residual_position], 2)
    mean = torch.where(is_new, at.float(), mean)
    repeats = rule.slopes.shape[0] // mean.shape[1]
    per_head = mean.repeat_interleave(repeats, 1)
    return bias + alibi_bias(per_head, merged.repeat_interleave(repeats, 1), dtype, rule).unflatten(1, (-1, repeats))


def find_moves(weight: Tensor, score: Tensor, position: Tensor, entering: Tensor, at: Tensor, rule: Rule) -> Moves:
    """Who leaves the ring, and whether it beats the context's lowest score (ties: the older token goes)."""
    ring = rule.proximity + 1
    leaving = ((at + 1) % ring).expand_as(entering).long()  # token at - proximity
    leaves = weight.gather(2, leaving) > 0
    if rule.context == 0:
        return Moves(entering, leaving, leaves, None, torch.zeros_like(leaves))
    part = slice(ring, ring + rule.context)
    rank = torch.where(weight[:, :, part] > 0, score[:, :, part], -torch.inf)
    lowest = rank.amin(2, keepdim=True)
    place = torch.where(rank == lowest, position[:, :, part], NEVER).argmin(2, keepdim=True) + ring
    return Moves(entering, leaving, leaves, place, leaves & (lowest <= score.gather(2, leaving)))


def tell(lost: Lost, now: State, moves: Moves, alive_row: Tensor) -> None:
    """Call `lost` with the token that leaves the cache; needed only where there is no residual to take it."""
    leaver = moves.leaving if moves.place is None else torch.where(moves.promoted, moves.place, moves.leaving)
    happens = moves.leaves & (now.weight.gather(2, leaver) > 0) & alive_row
    lost(pick(now.key, leaver), pick(now.value, leaver), happens)


def move(
    old: State, now: State, key: Tensor, value: Tensor, moves: Moves, alive_row: Tensor, gift: cam.Gift | None = None
) -> None:
    """Carry out the moves of one step on `old`, in place; `now` has this step's weights, scores and positions."""
    place = moves.leaving if moves.place is None else moves.place
    stays = torch.cat([moves.leaving, place], 2)  # the two tokens one of which is the victim
    pair_key, pair_value = pick(old.key, stays), pick(old.value, stays)
    pair_weight, pair_score, pair_position = (t.gather(2, stays) for t in (now.weight, now.score, now.position))
    promoted = moves.promoted

    # [B, G, k] slots to write and what is written there, part by part: entering, leaving, place, residual
    slots = [moves.entering, moves.leaving]
    keys, values = [key, pair_key[:, :, :1]], [value, pair_value[:, :, :1]]
    at = now.position.gather(2, moves.entering)
    weights = [now.weight.gather(2, moves.entering), torch.zeros_like(pair_weight[:, :, :1])]
    scores = [now.score.gather(2, moves.entering), torch.zeros_like(pair_score[:, :, :1])]
    positions = [at, pair_position[:, :, :1]]
    if moves.place is not None:
        slots.append(moves.place)
        keys.append(torch.where(promoted[..., None], pair_key[:, :, :1], pair_key[:, :, 1:]))
        values.append(torch.where(promoted[..., None], pair_value[:, :, :1], pair_value[:, :, 1:]))
        for parts, pair in zip((weights, scores, positions), (pair_weight, pair_score, pair_position), strict=True):
            parts.append(torch.where(promoted, pair[:, :, :1], pair[:, :, 1:]))
    if old.opened.shape[2]:
        victim = [torch.where(promoted[..., None], t[:, :, 1:], t[:, :, :1]).float() for t in (pair_key, pair_value)]
        facts = [torch.where(promoted, t[:, :, 1:], t[:, :, :1]) for t in (pair_weight, pair_score, pair_position)]
        happens = moves.leaves & (facts[0] > 0) & alive_row
        slot, merged = merge(old, now, victim[0], victim[1], facts[1], facts[2], happens)
        slots.append(slot)
        keys.append(merged[0].to(key.dtype))
        values.append(merged[1].to(value.dtype))
        for parts, new in zip((weights, scores, positions), merged[2:], strict=True):
            parts.append(new)
    value_slots = slots
    if gift is not None:
        victim_value = pair_value[:, :, :1]
        values[0] = gift.added(value, victim_value) if gift.to_new else value
        value_slots = [*slots, gift.slots]
        values.append(gift.added(pick(old.value, gift.slots), victim_value))
    write(old, now, slots, value_slots, keys, values, weights, scores, positions, alive_row)


def merge(
    old: State, now: State, key: Tensor, value: Tensor, score: Tensor, position: Tensor, happens: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Eqs. 6 and 7 on the fp32 masters, in place; key and value [B, G, 1, D] fp32, the rest [B, G, 1].

    A free slot is opened first. Returns the slot's index among all S, and its key, value, weight, score and
    position; where nothing `happens` these are the slot's own.
    """
    size = old.opened.shape[2]
    first = old.weight.shape[2] - size
    weight = now.weight[:, :, first:]
    free = weight == 0
    affinity = (old.residual_key * key).sum(-1).masked_fill(free, torch.inf)
    best = affinity == affinity.amax(2, keepdim=True)
    chosen = torch.where(best, old.opened, NEVER).argmin(2, keepdim=True)
    held = weight.gather(2, chosen)
    add = happens.float()
    share = (add / (held + add).clamp_min(1.0))[..., None]
    opens = happens & (held == 0)

    own_key, own_value = pick(old.residual_key, chosen), pick(old.residual_value, chosen)
    own_mean = old.residual_position.gather(2, chosen)
    new_key = torch.where(opens[..., None], key, own_key + share * (key - own_key))
    new_value = torch.where(opens[..., None], value, own_value + share * (value - own_value))
    new_mean = torch.where(opens, position.float(), own_mean + share[..., 0] * (position - own_mean))
    order = torch.where(opens, old.opened.amax(2, keepdim=True) + 1, old.opened.gather(2, chosen))
    put(old.residual_key, chosen, new_key)
    put(old.residual_value, chosen, new_value)
    put(old.residual_position, chosen, new_mean)
    put(old.opened, chosen, order)

    slot = chosen + first
    own_score, own_position = now.score.gather(2, slot), now.position.gather(2, slot)
    newest = torch.where(happens, torch.where(opens, position, own_position.maximum(position)), own_position)
    return slot, (new_key, new_value, held + add, torch.where(happens, own_score + score, own_score), newest)


def write(
    old: State,
    now: State,
    slots: list[Tensor],
    value_slots: list[Tensor],
    keys: list[Tensor],
    values: list[Tensor],
    weights: list[Tensor],
    scores: list[Tensor],
    positions: list[Tensor],
    alive_row: Tensor,
) -> None:
    """Write the step's slots, one `index_put_` per buffer; rows that are not active get their old content back."""
    index = torch.cat(slots, 2)  # [B, G, k], all different, as are the values'
    for buffer, where, parts in ((old.key, index, keys), (old.value, torch.cat(value_slots, 2), values)):
        put(buffer, where, torch.where(alive_row[..., None], torch.cat(parts, 2), pick(buffer, where)))
    put(old.position, index, torch.where(alive_row, torch.cat(positions, 2), old.position.gather(2, index)))
    for buffer, whole, parts in ((old.weight, now.weight, weights), (old.score, now.score, scores)):
        changed = whole.scatter(2, index, torch.cat(parts, 2))
        buffer.copy_(torch.where(alive_row, changed, buffer))


def pick(buffer: Tensor, index: Tensor) -> Tensor:
    """Rows of buffer [B, G, S, D] at index [B, G, k]: [B, G, k, D]."""
    rows, groups = axes(index)
    return buffer[rows, groups, index]


def put(buffer: Tensor, index: Tensor, content: Tensor) -> None:
    """buffer[b, g, index[b, g, k]] = content[b, g, k], in place, by the one op that Inductor does in place."""
    rows, groups = axes(index)
    buffer.index_put_((rows, groups, index), content)


def axes(index: Tensor) -> tuple[Tensor, Tensor]:
    """Index tensors of the row and head axes that go with index [B, G, k]."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None, None]
    groups = torch.arange(index.shape[1], device=index.device)[None, :, None]
    return rows, groups
