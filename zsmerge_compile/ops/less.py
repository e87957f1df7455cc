"""LESS: what is evicted goes into a state of low rank, to which queries still attend.

    phi(q) = |gelu(gelu(q W1) W2)|          psi(k) = |y + d2 * (y X)|,  y = |d1| * gelu(gelu(k U1) U2)
    on eviction of (k, v):  H = H + psi(k)^T v;  z = z + psi(k)
    out = (sum_i exp(s_i) v_i + phi(q) H) / (sum_i exp(s_i) + phi(q) z)

over the slots i that are held, by log-sum-exp. Source: Dong et al., "Get More with LESS: Synthesizing Recurrence with
KV Cache Compression for Efficient LLM Inference". Which tokens leave is `Rule`'s business; there is no residual.

As in the published code, queries and keys come rotated, a whole prompt attends to all of itself, and scores know
nothing of the low-rank part: a token receives exp(s_i) / sum_j exp(s_j) over what is held, so that what leaves is what
leaves without it. Ours: phi has weights per query head, psi per key/value head; feature maps, H and z are fp32.
Nothing is clamped: the published code raises phi(q) z, and each phi(q) that meets H, to 1e-6 at least, by which a cache
that has lost nothing would not be exact.

Shapes: b rows, H query heads, G key/value heads, r = H / G, n tokens, S slots, R rank, h hidden size, D head dim.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from zsmerge_compile.ops import contracts, decode, fold, reference, scores
from zsmerge_compile.ops.state import Rule, State

BLOCK = 64  # columns that attend at a time


class Maps(NamedTuple):
    """One layer's feature maps, fp32."""

    w1: Tensor  # [H, D, h]
    w2: Tensor  # [H, h, R]
    u1: Tensor  # [G, D, h]
    u2: Tensor  # [G, h, R]
    d1: Tensor  # [G, R]
    mix: Tensor  # [G, R, R], the X above
    d2: Tensor  # [G, R]

    def phi(self, query: Tensor) -> Tensor:
        """query [b, H, n, D] -> [b, H, n, R], fp32, none negative."""
        return F.gelu(F.gelu(query.float() @ self.w1) @ self.w2).abs()

    def psi(self, key: Tensor) -> Tensor:
        """key [b, G, n, D] -> [b, G, n, R], fp32, none negative."""
        y = self.d1.abs()[:, None] * F.gelu(F.gelu(key.float() @ self.u1) @ self.u2)
        return (y + self.d2[:, None] * (y @ self.mix)).abs()


class LowRank(NamedTuple):
    """What was evicted."""

    low_rank: Tensor  # [B, G, R, D] fp32, H
    normalizer: Tensor  # [B, G, R] fp32, z


STATE_FIELDS = (*State._fields, *LowRank._fields)
_SIZE = len(STATE_FIELDS)


class Shared(NamedTuple):
    """Attention to the slots and to the low-rank state: out = scale * (attention @ value) + given."""

    attention: Tensor  # [b, G, r, t, S] softmax over the slots alone, NaN for a row of -inf
    scale: Tensor  # [b, G, r, t, 1] the slots' part of the denominator
    given: Tensor  # [b, G, r, t, D] the low-rank part of the output


def share(logits: Tensor, features: Tensor, low: LowRank) -> Shared:
    """Of logits [b, G, r, t, S] and features phi(q) [b, G, r, t, R]; features that meet nothing give zeros."""
    met = (features * low.normalizer[:, :, None, None]).sum(-1, keepdim=True)
    lost = torch.where(met > 0, met, 1.0)
    own = lost.log().masked_fill(met <= 0, -torch.inf)
    kept = logits.logsumexp(-1, keepdim=True)
    total = torch.logaddexp(kept, own)
    given = (own - total).exp() * (features @ low.low_rank[:, :, None] / lost)
    return Shared(torch.softmax(logits, -1), (kept - total).exp(), given)


def step(
    state: State,
    low: LowRank,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    active: Tensor,
    rule: Rule,
    maps: Maps,
) -> Tensor:
    """One decode step, in place, as `decode.step`."""

    def attend(
        state: State, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, entering: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor]:
        groups = key.shape[1]
        is_new = decode.new_slot(state, entering)[:, :, None]
        grouped = query.unflatten(1, (groups, -1))[:, :, :, 0]
        old, new = (grouped @ state.key.mT).float(), (grouped.float() * key.float()).sum(-1, keepdim=True)
        logits = torch.where(is_new, new, old) * rule.scale + bias
        features = maps.phi(query).unflatten(1, (groups, -1))
        attention, scale, given = (t[:, :, :, 0] for t in share(logits[:, :, :, None], features, low))
        on_new = (attention * is_new).sum(-1, keepdim=True)
        out = (attention.masked_fill(is_new, 0.0).to(value.dtype) @ state.value).float() + on_new * value.float()
        return (scale * out + given).to(query.dtype).flatten(1, 2)[:, :, None], attention.sum(2)

    def lost(key: Tensor, value: Tensor, happens: Tensor) -> None:
        features = maps.psi(key) * happens[..., None]
        low.low_rank.add_(features.mT @ value.float())
        low.normalizer.add_(features[:, :, 0])

    return decode.step(state, query, key, value, seen, active, rule, attend, lost)


def extend(
    state: State,
    low: LowRank,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    maps: Maps,
    loop: Any = None,
) -> tuple[Tensor, State, LowRank]:
    """As `reference.extend`, for columns that BLOCK divides; `loop` runs the blocks, by default one after the other."""
    n, groups = query.shape[2], key.shape[1]
    column = torch.arange(n, device=query.device)
    at = (seen - pads)[:, None] + column
    slot_bias = reference.slot_biases(state, query.dtype, rule)
    new_bias = reference.token_biases(at, groups, query.dtype, rule)
    live = (state.weight > 0)[:, :, None]
    slots = state.weight.shape[2]

    def block(carry: tuple[Tensor, Tensor], chosen: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        q, mine = chosen  # [b, H, BLOCK, D], [BLOCK]
        grouped = q.unflatten(1, (groups, -1))
        place = (seen - pads)[:, None] + mine
        sees_slot = reference.visible(place, state.position, rule.window) & live
        behind = mine[:, None] - column
        sees_new = behind >= 0 if rule.window is None else (behind >= 0) & (behind < rule.window)
        sees_new = sees_new & (column >= pads[:, None])[:, None]
        to_slots = (grouped @ state.key[:, :, None].mT).float() * rule.scale + slot_bias
        to_new = (grouped @ key[:, :, None].mT).float() * rule.scale + new_bias
        logits = torch.cat(
            [
                torch.where(sees_slot[:, :, None], to_slots, -torch.inf),
                torch.where(sees_new[:, None, None], to_new, -torch.inf),
            ],
            -1,
        )
        attention, scale, given = share(logits, maps.phi(q).unflatten(1, (groups, -1)), low)
        real = (mine >= pads[:, None])[:, None, None, :, None]  # a pad sees nothing: softmax gives NaN
        attention = torch.where(real, attention, 0.0)
        discount = scores.discount(rule, column[-1] - mine)
        mass = (attention * discount[:, None]).sum((2, 3))
        on = attention.to(value.dtype)
        part = (on[..., :slots] @ state.value[:, :, None] + on[..., slots:] @ value[:, :, None]).float()
        out = torch.where(real, scale * part + given, 0.0).to(value.dtype)
        return (carry[0] + mass[..., :slots], carry[1] + mass[..., slots:]), out.flatten(1, 2)

    start = torch.zeros_like(state.score), torch.zeros_like(key[..., 0], dtype=torch.float32)
    blocks = query.unflatten(2, (-1, BLOCK)).movedim(2, 0).contiguous(), column.unflatten(0, (-1, BLOCK))
    (held, received), out = (loop or one_by_one)(block, start, blocks)
    score, new_score = scores.after_prompt(state, held, received, seen, pads, rule)
    scored = state._replace(score=score)
    keys, values = (torch.cat([had, new], 2) for had, new in ((state.key, key), (state.value, value)))
    ring, context, victims, after = fold.sort_out(scored, keys, values, new_score, seen, pads, rule)
    folded = fold.join(ring, context, fold.open_residual(scored, after, rule.expiry), state.key.dtype)
    features = maps.psi(victims.key) * victims.weight[..., None]
    lost = LowRank(low.low_rank + features.mT @ victims.value.float(), low.normalizer + features.sum(2))
    return out.movedim(0, 2).flatten(2, 3), folded, lost


def one_by_one(block: Any, carry: Any, blocks: tuple[Tensor, ...]) -> tuple[Any, Tensor]:
    """What `scan` does, in Python."""
    outs = []
    for chosen in zip(*blocks, strict=True):
        carry, out = block(carry, chosen)
        outs.append(out)
    return carry, torch.stack(outs)


def decode_step(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`zsmerge::less_decode` in aten nodes, the state written in place; a Kernel's `run` (`lower.kernels`)."""
    state, low, (seen, active), rule, maps = _split(rest, 2)
    return step(state, low, query, key, value, seen, active, rule, maps)


def extend_step(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`zsmerge::less_extend` in aten nodes and one scan; a Kernel's `run`."""
    return _extend(query, key, value, rest, scan)


def _extend(query: Tensor, key: Tensor, value: Tensor, rest: tuple[Any, ...], loop: Any) -> Tensor:
    state, low, (rows, seen, pads), rule, maps = _split(rest, 3)
    columns = query.shape[2]
    # more padding on the left, up to whole blocks; two at least, as a trace for one block would be for one alone
    short = torch.sym_max(2, (columns + BLOCK - 1) // BLOCK) * BLOCK - columns
    query, key, value = (F.pad(t, (0, 0, short, 0)) for t in (query, key, value))
    mine, had = State(*(t.index_select(0, rows) for t in state)), LowRank(*(t.index_select(0, rows) for t in low))
    given = (query, key, value, seen.index_select(0, rows), pads + short, rule, maps)
    out, new, lost = extend(mine, had, *given, loop=loop)
    touched = pads < columns  # a row that is all padding keeps its state
    for buffer, old, content in zip((*state, *low), (*mine, *had), (*new, *lost), strict=True):
        wide = touched.view(-1, *([1] * (old.dim() - 1)))
        buffer.index_copy_(0, rows, torch.where(wide, content, old))
    return out[:, :, short:]


def _split(rest: tuple[Any, ...], call: int) -> tuple[State, LowRank, tuple[Any, ...], Rule, Maps]:
    """An op's arguments after the value, `call` of them between the state and the rule."""
    count = len(fields(Rule))
    state, low, trailing = State(*rest[:9]), LowRank(*rest[9:_SIZE]), rest[_SIZE + call :]
    return state, low, rest[_SIZE : _SIZE + call], Rule(*trailing[:count]), Maps(*trailing[count:])


_STATE = ", ".join(f"Tensor({'abcdefghijk'[i]}!) {name}" for i, name in enumerate(STATE_FIELDS))
_MAPS = ", ".join(f"Tensor {name}" for name in Maps._fields)
_library = torch.library.Library("zsmerge", "FRAGMENT")
_library.define(
    f"less_decode(Tensor query, Tensor new_key, Tensor new_value, {_STATE}, Tensor seen, Tensor active, "
    f"{contracts.RULE}, {_MAPS}) -> Tensor"
)
_library.define(
    f"less_extend(Tensor query, Tensor new_key, Tensor new_value, {_STATE}, Tensor rows, Tensor seen, Tensor pads, "
    f"{contracts.RULE}, {_MAPS}) -> Tensor"
)
_library.impl("less_decode", decode_step, "CompositeExplicitAutograd")


@torch.library.impl(_library, "less_extend", "CompositeExplicitAutograd")
def _less_extend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return _extend(query, key, value, rest, one_by_one).contiguous()


@torch.library.register_fake("zsmerge::less_decode", lib=_library)
@torch.library.register_fake("zsmerge::less_extend", lib=_library)
def _fake(query: Tensor, *rest: object) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


DECODE = torch.ops.zsmerge.less_decode.default
EXTEND = torch.ops.zsmerge.less_extend.default
