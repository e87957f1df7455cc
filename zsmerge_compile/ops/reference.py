"""The specification, executable: one rule for every call with n new tokens (decode is n = 1).

Eager, fp32, plain tensors; reads as papers/ZSMerge eqs. 5-8 and Algorithm 1, generalised to n tokens:

1. each new token attends to the cache as it was plus the new tokens up to itself (eq. 8);
2. score = decay**n * score + sum_j decay**(n-j) * attention_j, summed over a group's query heads (eq. 5),
   or what another policy takes for it (`ops/scores.py`);
3. the ring keeps the newest `proximity` tokens; those that left it join the context's candidates,
   of which the best `context` scores stay; the rest go to the residual in position order (eqs. 6, 7).

The first two are below, the third in `ops/fold.py`. Every other implementation is tested against these two files,
and they against lists of tokens.
Shapes: b rows, H query heads, G key/value heads, r = H / G, n new tokens, S slots, R residual slots, D head dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zsmerge_compile.ops import places, scores
from zsmerge_compile.ops.fold import fold
from zsmerge_compile.ops.state import Rule, State, alibi_bias

BLOCK = 128  # query tokens handled at a time: no buffer above heads x BLOCK x (S + n)


def extend(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    decoded: bool = False,
) -> tuple[Tensor, State]:
    """Attend with n new tokens, then fold them into the cache.

    query [b, H, n, D]; key, value [b, G, n, D]; seen [b] tokens already in the cache; pads [b] leading columns
    that are padding. Returns out [b, H, n, D] (zero at padding) and the new state. A row with pads == n keeps
    its state. decoded: the tokens are no part of a prompt, which "observed" scores and merging in sets tell apart.
    """
    attends = attend if rule.places == "text" else places.attend
    out, held, received = attends(state, query, key, value, seen, pads, rule)
    score, new_score = scores.after_prompt(state, held, received, seen, pads, rule, decoded)
    scored, attention = state._replace(score=score), (held, received)
    folding = replace(rule, sets=None) if decoded else rule
    at = seen[:, None] + torch.arange(query.shape[2], device=query.device) - pads[:, None]
    keys = places.kept(key, at, rule)
    folded = fold(scored, keys, value, new_score, seen, pads, folding, attention=attention)
    touched = pads < query.shape[2]
    kept = [
        torch.where(touched.view(-1, *([1] * (old.dim() - 1))), new, old)
        for old, new in zip(state, folded, strict=True)
    ]
    return out, State(*kept)


def attend(
    state: State, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, pads: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Compensated attention of n new tokens (eq. 8), in blocks of queries.

    Returns out [b, H, n, D], and the discounted attention sum_j decay**(n-j) * attention_j received by the
    slots, [b, G, S], and by the new tokens, [b, G, n].
    """
    b, heads, n, dim = query.shape
    groups = key.shape[1]
    column = torch.arange(n, device=query.device)
    at = seen[:, None] + column - pads[:, None]  # [b, n] position of each new token
    real = column >= pads[:, None]  # [b, n]
    grouped = query.float().reshape(b, groups, heads // groups, n, dim)
    slot_key, slot_value = state.key.float(), state.value.float()
    new_key, new_value = key.float(), value.float()
    slot_bias = slot_biases(state, query.dtype, rule)  # [b, G, r or 1, 1, S]
    new_bias = token_biases(at, groups, query.dtype, rule)  # [b, G, r, 1, n] or 0
    out = torch.zeros_like(grouped)
    held = torch.zeros_like(state.score)
    received = torch.zeros(b, groups, n, device=query.device)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        q = grouped[:, :, :, start:stop]
        sees_slot = visible(at[:, start:stop], state.position, rule.window) & (state.weight > 0)[:, :, None]
        to_slots = (q @ slot_key[:, :, None].mT * rule.scale + slot_bias).masked_fill(
            ~sees_slot[:, :, None], -torch.inf
        )
        sees_new = column[start:stop, None] >= column[None, :stop]
        if rule.window is not None:
            sees_new = sees_new & (column[start:stop, None] - column[None, :stop] < rule.window)
        sees_new = sees_new & real[:, None, :stop] & real[:, start:stop, None]  # [b, t, stop]
        bias = new_bias if isinstance(new_bias, float) else new_bias[..., :stop]
        to_new = (q @ new_key[:, :, None, :stop].mT * rule.scale + bias).masked_fill(
            ~sees_new[:, None, None], -torch.inf
        )
        attention = torch.softmax(torch.cat([to_slots, to_new], -1), -1)
        attention = torch.where(real[:, None, None, start:stop, None], attention, 0.0)  # padding attends to nothing
        on_slots, on_new = attention.split([slot_key.shape[2], stop], -1)
        out[:, :, :, start:stop] = on_slots @ slot_value[:, :, None] + on_new @ new_value[:, :, None, :stop]
        discount = scores.discount(rule, n - 1 - column[start:stop])
        held += torch.einsum("bgrts,t->bgs", on_slots, discount)
        received[:, :, :stop] += torch.einsum("bgrts,t->bgs", on_new, discount)
    return out.view(b, heads, n, dim).to(query.dtype), held, received


def slot_biases(state: State, dtype: torch.dtype, rule: Rule) -> Tensor:
    """alpha * log(weight), plus ALiBi where the model has it: [b, G, r or 1, 1, S]; 0 at empty slots."""
    live = state.weight > 0
    bias = rule.alpha * torch.where(live, state.weight, 1.0).log()[:, :, None, None]
    if rule.slopes is None:
        return bias
    singles = state.position.shape[2] - state.residual_position.shape[2]
    mean = torch.cat([state.position[:, :, :singles].float(), state.residual_position], 2)
    repeats = rule.slopes.shape[0] // mean.shape[1]
    per_head = mean.repeat_interleave(repeats, 1)
    merged = (state.weight > 1).repeat_interleave(repeats, 1)
    return bias + alibi_bias(per_head, merged, dtype, rule).unflatten(1, (-1, repeats))[:, :, :, None]


def token_biases(at: Tensor, groups: int, dtype: torch.dtype, rule: Rule) -> Tensor | float:
    """ALiBi bias of the new tokens at positions `at` [b, n]: [b, G, r, 1, n]; 0.0 without ALiBi."""
    if rule.slopes is None:
        return 0.0
    return alibi_bias(at[:, None].float(), None, dtype, rule).unflatten(1, (groups, -1))[:, :, :, None]


def visible(at: Tensor, newest: Tensor, window: int | None) -> Tensor:
    """Whether queries at positions `at` [b, t] see slots whose newest member is `newest` [b, G, S]: [b, G, t, S]."""
    if window is None:
        return torch.ones((), dtype=torch.bool, device=at.device)
    return at[:, None, :, None] - newest[:, :, None] < window
