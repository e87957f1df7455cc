"""Many new tokens at once as one graph: the rule of `reference.extend` without a look at the data.

What `ops/prefill.py` decides from the data (which rows share their padding, whether the cache is empty, how many
tokens are merged) is not decided here: queries go through in blocks, arrivals at the residual one by one, both by the
scan operator, which torch.export keeps as a loop, Inductor compiles to one and ONNX calls Scan. No buffer holds more
than a block times (S + T).

Shapes: b rows, H query heads, G key/value heads, r = H / G, T columns, S slots, R residual slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from zsmerge_compile.ops import fold, places, reference, scores
from zsmerge_compile.ops.decode import Blend
from zsmerge_compile.ops.fold import Residual
from zsmerge_compile.ops.state import Rule, State
from zsmerge_compile.ops.tokens import Tokens

BLOCK = 64  # columns that attend at a time
Loop = Callable[..., tuple[Any, Tensor]]  # (step, start, slices) -> (last carry, stacked outputs), as torch's scan


def extend_step(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`zsmerge::extend` in aten nodes and scans, the state written in place; a Kernel's `run` (`lower.kernels`)."""
    state, (rows, seen, pads), rule = State(*rest[:9]), rest[9:12], Rule(*rest[12:])
    out, new = extend(State(*(t.index_select(0, rows) for t in state)), query, key, value, seen[rows], pads, rule)
    for buffer, content in zip(state, new, strict=True):
        buffer.index_copy_(0, rows, content)
    return out


def extend(
    state: State, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, pads: Tensor, rule: Rule
) -> tuple[Tensor, State]:
    """As `reference.extend`."""
    out, kept, _ = extended(state, query, key, value, seen, pads, rule)
    return out, kept


def extended(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    blend: Blend | None = None,
    loop: Loop | None = None,
) -> tuple[Tensor, State, Tokens]:
    """As `extend`, and the tokens that left ring and context, weight 0 marking holes.

    blend: see `decode.Blend`; loop: what runs the blocks of queries, None: the scan operator.
    """
    columns = query.shape[2]
    # more padding on the left, up to whole blocks; two at least, as a trace for one block would be for one alone
    short = torch.sym_max(2, (columns + BLOCK - 1) // BLOCK) * BLOCK - columns
    query, key, value = (F.pad(t, (0, 0, short, 0)) for t in (query, key, value))
    touched = (pads < columns)[:, None, None]
    pads = pads + short
    if rule.places == "text":
        out, held, received = attend(state, query, key, value, seen, pads, rule, blend, loop)
    else:
        out, held, received = attend_placed(state, query, key, value, seen, pads, rule)
    key = places.kept(key, (seen - pads)[:, None] + torch.arange(key.shape[2], device=key.device), rule)
    score, new_score = scores.after_prompt(state, held, received, seen, pads, rule)
    scored = state._replace(score=score)
    singles = rule.proximity + 1 + rule.context
    keys, values = (torch.cat([had[:, :, :singles], new], 2) for had, new in ((state.key, key), (state.value, value)))
    ring, context, victims, after = fold.sort_out(scored, keys, values, new_score, seen, pads, rule, (held, received))
    residual = absorb(fold.open_residual(scored, after, rule.expiry), victims, rule.merge)
    folded = fold.join(ring, context, residual, state.key.dtype)
    kept = [
        torch.where(touched.view(-1, *([1] * (old.dim() - 1))), new, old)
        for old, new in zip(state, folded, strict=True)
    ]
    return out[:, :, short:], State(*kept), victims


def one_by_one(step: Callable[..., tuple[Any, Tensor]], carry: Any, slices: tuple[Tensor, ...]) -> tuple[Any, Tensor]:
    """What the scan operator does, in Python."""
    outs = []
    for chosen in zip(*slices, strict=True):
        carry, out = step(carry, chosen)
        outs.append(out)
    return carry, torch.stack(outs)


def in_blocks(query: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [b, H, T, D] and their columns by blocks: [T / BLOCK, b, H, BLOCK, D] and [T / BLOCK, BLOCK]."""
    column = torch.arange(query.shape[2], device=query.device)
    return query.unflatten(2, (-1, BLOCK)).movedim(2, 0).contiguous(), column.unflatten(0, (-1, BLOCK))


def attend(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    blend: Blend | None = None,
    loop: Loop | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.attend`, for a number of columns that BLOCK divides; blend and loop as for `extended`."""
    groups, slots = key.shape[1], state.weight.shape[2]
    repeats = query.shape[1] // groups
    column = torch.arange(query.shape[2], device=query.device)
    at = (seen - pads)[:, None] + column
    slot_bias = reference.slot_biases(state, query.dtype, rule)
    new_bias = reference.token_biases(at, groups, query.dtype, rule)
    live = (state.weight > 0)[:, :, None]

    def block(carry: tuple[Tensor, Tensor], chosen: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        held, received = carry
        q, mine = chosen  # [b, H, BLOCK, D], [BLOCK]
        grouped = q.unflatten(1, (groups, repeats)).flatten(2, 3)  # [b, G, r * BLOCK, D]
        sees_slot = reference.visible((seen - pads)[:, None] + mine, state.position, rule.window) & live
        behind = mine[:, None] - column
        sees_new = behind >= 0 if rule.window is None else (behind >= 0) & (behind < rule.window)
        sees_new = sees_new & (column >= pads[:, None])[:, None]  # [b, BLOCK, T]
        to_slots = (grouped @ state.key.mT).float().unflatten(2, (repeats, BLOCK)) * rule.scale + slot_bias
        to_new = (grouped @ key.mT).float().unflatten(2, (repeats, BLOCK)) * rule.scale + new_bias
        logits = torch.cat(
            [
                torch.where(sees_slot[:, :, None], to_slots, -torch.inf),
                torch.where(sees_new[:, None, None], to_new, -torch.inf),
            ],
            -1,
        )
        real = (mine >= pads[:, None])[:, None, None, :, None]  # a pad sees nothing: softmax gives NaN
        attention = torch.where(real, torch.softmax(logits, -1), 0.0)
        discount = scores.discount(rule, column[-1] - mine)
        mass = (attention * discount[:, None]).sum((2, 3))
        rows = attention.flatten(2, 3).to(value.dtype)
        part = (rows[..., :slots] @ state.value + rows[..., slots:] @ value).unflatten(2, (repeats, BLOCK))
        if blend is not None:
            part = torch.where(real, blend(q, logits, part.float()), 0.0).to(value.dtype)
        carried = held + mass[..., :slots], received + mass[..., slots:]
        return carried, part.flatten(1, 2)

    start = torch.zeros_like(state.score), torch.zeros_like(key[..., 0], dtype=torch.float32)
    (held, received), out = (loop or scan)(block, start, in_blocks(query))
    return out.movedim(0, 2).flatten(2, 3), held, received


def attend_placed(
    state: State, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, pads: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """As `places.attend`, for a number of columns that BLOCK divides."""
    had, every = places.held(state, seen, rule), slice(None)
    fresh = places.new(key, value, pads, had, rule)

    def block(carry: Tensor, chosen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, mine = chosen  # [b, H, BLOCK, D], [BLOCK]
        at = (seen - pads)[:, None] + mine
        to_slots = places.slot_logits(q, at, had, rule)
        to_new = places.token_logits(q, at, every, had, fresh, rule)
        attention = torch.softmax(torch.cat([to_slots, to_new], -1), -1)
        attention = torch.where((at >= seen[:, None])[:, None, None, :, None], attention, 0.0)
        return carry + 1, places.weighted(attention, state.value, fresh, value)

    _, out = scan(block, torch.zeros((), device=query.device), in_blocks(query))
    received = torch.zeros_like(key[..., 0], dtype=torch.float32)
    return out.movedim(0, 2).flatten(2, 3), torch.zeros_like(state.score), received


def absorb(residual: Residual, victims: Tokens, merge: str) -> Residual:
    """As `fold.absorb`."""
    size = residual.weight.shape[2]
    if size == 0:
        return residual
    arrivals = fold.segments(victims, size) if merge == "segment" else fold.every(victims)

    def one(held: tuple[Tensor, ...], arrival: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        new = fold.absorb_one(Residual(*held), Residual(*(t.unsqueeze(2) for t in arrival)))
        return tuple(new), new.weight.sum()

    steps = tuple(t.movedim(2, 0).contiguous() for t in arrivals)
    last, _ = scan(one, tuple(t.clone() for t in residual), steps)
    return Residual(*last)
