"""Many new tokens at once: the rule of `reference.extend`, with exact attention at the speed of SDPA.

A prompt on an empty cache takes its outputs from `scaled_dot_product_attention`, row by row where the padding
differs, so no mask is built; only the last queries, those the decayed score still feels, are looked at again for
eq. 5. A prompt that continues a cache, or a model with ALiBi, computes both in one pass over blocks of queries.
That pass and the merging one by one may be a device's kernels instead (`Parts`); everything else is the same.
No buffer holds more than a few blocks times (S + T): b rows, H heads, G key/value heads, T columns, S slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zsmerge_compile.ops import places, reference, scores
from zsmerge_compile.ops.fold import InTurn, fold, in_turn
from zsmerge_compile.ops.state import Rule, State

BLOCK_ROWS = 1024  # batch rows x heads x queries of one block
SCORE_ERROR = 1e-6  # what a score may lose by not looking at queries of long ago


def extend(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    parts: Parts | None = None,
) -> Tensor:
    """Attend with T columns and fold them into rows `rows` [b] of the cache, in place.

    query [b, H, T, D]; key, value [b, G, T, D]; seen [B] tokens in the cache; pads [b] leading padding columns.
    Returns out [b, H, T, D], zero at padding. `parts` may be kernels; without them everything is plain aten.
    """
    parts = parts or ATEN
    mine = State(*(t.index_select(0, rows) for t in state))
    had = seen.index_select(0, rows)
    out, held, received = attend(mine, query, key, value, had, pads, rule, parts)
    columns = query.shape[2]
    score, new_score = scores.after_prompt(mine, held, received, had, pads, rule)
    scored, attention = mine._replace(score=score), (held, received)
    at = had[:, None] + torch.arange(columns, device=query.device) - pads[:, None]
    keys = places.kept(key, at, rule)
    folded = fold(scored, keys, value, new_score, had, pads, rule, parts.in_turn, attention)
    touched = rows[pads < columns]  # a row that is all padding keeps its state
    for buffer, new in zip(state, folded, strict=True):
        buffer.index_copy_(0, touched, new[pads < columns])
    return out


def attend(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    parts: Parts,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.attend`: out [b, H, T, D], attention on slots [b, G, S] and on the new tokens [b, G, T]."""
    columns = query.shape[2]
    if rule.places != "text":
        far = rule.places in places.LAMBDA and columns > rule.proximity
        if far or rule.slopes is not None or bool((seen > 0).any()):
            return places.attend(state, query, key, value, seen, pads, rule)
        at = torch.arange(columns, device=query.device) - pads[:, None]
        query, key = (places.kept(tensor, at, rule) for tensor in (query, key))
    first = max(0, columns - scored_queries(rule, query.shape[1] // key.shape[1]))
    if rule.slopes is not None or bool((seen > 0).any()):
        out, *mass = parts.blocks(state, query, key, value, seen, pads, rule, first=0, want_out=True)
        if rule.scoring != "received" and 0 < first < columns:  # a kernel counts all queries from `first` on
            _, *mass = parts.blocks(state, query, key, value, seen, pads, rule, first=first, want_out=False)
        return out, mass[0], mass[1]
    out, held, received = parts.blocks(state, query, key, value, seen, pads, rule, first=first, want_out=parts.late_out)
    until = first if parts.late_out else columns
    for pad, members in rows_by_padding(pads):
        if pad < until:
            chosen = [t[members, :, pad:until] for t in (query, key, value)]
            out[members, :, pad:until] = causal_attention(chosen[0], chosen[1], chosen[2], rule)
    return out, held, received


def scored_queries(rule: Rule, group: int) -> int:
    """How many of the last queries decide a score."""
    if rule.scoring == "received":
        return felt_queries(rule.decay, group)
    return rule.observed


def felt_queries(decay: float, group: int) -> int:
    """How many of the last queries a score still feels: decay**n * group / (1 - decay) < SCORE_ERROR beyond."""
    if decay == 1.0:
        return 2**62
    if decay == 0.0:
        return 1
    return math.ceil(math.log(SCORE_ERROR * (1 - decay) / group) / math.log(decay))


def rows_by_padding(pads: Tensor) -> list[tuple[int, list[int] | slice]]:
    """Rows that share a number of padding columns, so that each group is one dense call."""
    counts = pads.tolist()
    if len(set(counts)) == 1:
        return [(counts[0], slice(None))]
    return [(pad, [i for i, other in enumerate(counts) if other == pad]) for pad in sorted(set(counts))]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """Exact causal (or sliding-window) attention of unpadded rows: query [b, H, n, D], key, value [b, G, n, D]."""
    n, grouped = query.shape[2], query.shape[1] != key.shape[1]
    if rule.window is None or n <= rule.window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=rule.scale, enable_gqa=grouped)
    out = torch.empty_like(query)
    step = max(64, BLOCK_ROWS // (query.shape[0] * query.shape[1]))
    for start in range(0, n, step):
        stop, oldest = min(start + step, n), max(0, start - rule.window + 1)
        behind = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(
            oldest, stop, device=query.device
        )
        band = (behind >= 0) & (behind < rule.window)
        out[:, :, start:stop] = F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, oldest:stop],
            value[:, :, oldest:stop],
            attn_mask=band,
            scale=rule.scale,
            enable_gqa=grouped,
        )
    return out


def blocks(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    *,
    first: int,
    want_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 8 for the queries from column `first` on, block by block; the outputs only if `want_out`, zeros elsewhere.

    The query heads of a group are the rows of one matrix product, so keys and values are never repeated.
    """
    b, heads, n, dim = query.shape
    groups, slots = key.shape[1], state.weight.shape[2]
    repeats = heads // groups
    column = torch.arange(n, device=query.device)
    at = seen[:, None] + column - pads[:, None]
    slot_bias = reference.slot_biases(state, query.dtype, rule)
    new_bias = reference.token_biases(at, groups, query.dtype, rule)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    held, received = torch.zeros_like(state.score), torch.zeros(b, groups, n, device=query.device)
    live = (state.weight > 0)[:, :, None]
    step = max(1, BLOCK_ROWS // (b * heads))
    for start in range(first, n, step):
        stop = min(start + step, n)
        oldest = 0 if rule.window is None else max(0, start - rule.window + 1)
        mine = column[start:stop]
        q = query[:, :, start:stop].reshape(b, groups, repeats * (stop - start), dim)
        shape = (b, groups, repeats, stop - start, -1)
        hidden_slot = ~(reference.visible(at[:, start:stop], state.position, rule.window) & live)
        hidden_new = hidden_tokens(mine, column[oldest:stop], pads, rule.window)
        bias = new_bias if isinstance(new_bias, float) else new_bias[..., oldest:stop]
        logits = torch.cat(
            [
                ((q @ state.key.mT).float().view(shape) * rule.scale + slot_bias).masked_fill_(
                    hidden_slot[:, :, None], -torch.inf
                ),
                ((q @ key[:, :, oldest:stop].mT).float().view(shape) * rule.scale + bias).masked_fill_(
                    hidden_new[:, None, None], -torch.inf
                ),
            ],
            -1,
        )
        attention = torch.softmax(logits, -1)
        attention.masked_fill_((mine < pads[:, None])[:, None, None, :, None], 0.0)
        discount = scores.discount(rule, n - 1 - mine).repeat(repeats)
        rows = attention.view(b, groups, len(discount), -1)
        mass = discount @ rows  # [b, G, S + u]
        held += mass[..., :slots]
        received[..., oldest:stop] += mass[..., slots:]
        if want_out:
            rows = rows.to(value.dtype)
            part = rows[..., :slots] @ state.value + rows[..., slots:] @ value[:, :, oldest:stop]
            out[:, :, start:stop] = part.view(b, heads, stop - start, dim)
    return out, held, received


def hidden_tokens(mine: Tensor, others: Tensor, pads: Tensor, window: int | None) -> Tensor:
    """Which new tokens (columns `others`) the queries (columns `mine`) don't see: [b, t, u]."""
    behind = mine[:, None] - others
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return ~(seen & (others >= pads[:, None])[:, None])


class Parts(NamedTuple):
    """What a kernel may do instead, with the signatures of `blocks` and `fold.in_turn`."""

    blocks: Callable[..., tuple[Tensor, Tensor, Tensor]]
    in_turn: InTurn
    late_out: bool  # `blocks` is as fast as SDPA: it gives the late queries' outputs too, and SDPA stops before them


ATEN = Parts(blocks, in_turn, late_out=False)
