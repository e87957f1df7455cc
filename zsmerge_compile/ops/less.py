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
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zsmerge_compile.ops import contracts, decode, scan
from zsmerge_compile.ops.state import Rule, State


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


def blended(low: LowRank, maps: Maps) -> decode.Blend:
    """Joins attention over slots with that to the low-rank state."""

    def blend(query: Tensor, logits: Tensor, out: Tensor) -> Tensor:
        """Features that meet nothing give nothing; NaN where all logits are -inf too."""
        features = maps.phi(query).unflatten(1, (logits.shape[1], -1))
        met = (features * low.normalizer[:, :, None, None]).sum(-1, keepdim=True)
        lost = torch.where(met > 0, met, 1.0)
        own = lost.log().masked_fill(met <= 0, -torch.inf)
        ahead = logits.logsumexp(-1, keepdim=True) - own
        return ahead.sigmoid() * out + (-ahead).sigmoid() * (features @ low.low_rank[:, :, None] / lost)

    return blend


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

    def lost(key: Tensor, value: Tensor, happens: Tensor) -> None:
        features = maps.psi(key) * happens[..., None]
        low.low_rank.add_(features.mT @ value.float())
        low.normalizer.add_(features[:, :, 0])

    attend = partial(decode.attend, blend=blended(low, maps))
    return decode.step(state, query, key, value, seen, active, rule, attend, lost)


def decode_step(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`zsmerge::less_decode` in aten nodes, the state written in place; a Kernel's `run` (`lower.kernels`)."""
    state, low, (seen, active), rule, maps = _split(rest, len(contracts.TOKEN))
    return step(state, low, query, key, value, seen, active, rule, maps)


def extend_step(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`zsmerge::less_extend` in aten nodes and one scan; a Kernel's `run`."""
    return _extend(query, key, value, rest)


def _extend(query: Tensor, key: Tensor, value: Tensor, rest: tuple[Any, ...], loop: scan.Loop | None = None) -> Tensor:
    """A prompt or a chunk, as `scan.extend_step`; `loop` as for `scan.extended`."""
    state, low, (rows, seen, pads), rule, maps = _split(rest, len(contracts.PROMPT))
    mine, had = State(*(t.index_select(0, rows) for t in state)), LowRank(*(t.index_select(0, rows) for t in low))
    given = (query, key, value, seen.index_select(0, rows), pads, rule)
    out, new, victims = scan.extended(mine, *given, blended(had, maps), loop)
    features = maps.psi(victims.key) * victims.weight[..., None]
    lost = LowRank(had.low_rank + features.mT @ victims.value.float(), had.normalizer + features.sum(2))
    for buffer, content in zip((*state, *low), (*new, *lost), strict=True):
        buffer.index_copy_(0, rows, content)
    return out


def _split(rest: tuple[Any, ...], call: int) -> tuple[State, LowRank, tuple[Any, ...], Rule, Maps]:
    """An op's arguments after the value, `call` of them between the state and the rule."""
    count = len(fields(Rule))
    state, low, trailing = State(*rest[:9]), LowRank(*rest[9:_SIZE]), rest[_SIZE + call :]
    return state, low, rest[_SIZE : _SIZE + call], Rule(*trailing[:count]), Maps(*trailing[count:])


_library = torch.library.Library("zsmerge", "FRAGMENT")
_library.define(contracts.schema("less_decode", STATE_FIELDS, contracts.TOKEN, Maps._fields))
_library.define(contracts.schema("less_extend", STATE_FIELDS, contracts.PROMPT, Maps._fields))
_library.impl("less_decode", decode_step, "CompositeExplicitAutograd")


@torch.library.impl(_library, "less_extend", "CompositeExplicitAutograd")
def _less_extend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return _extend(query, key, value, rest, scan.one_by_one).contiguous()


for _name in ("less_decode", "less_extend"):
    torch.library.register_fake(f"zsmerge::{_name}", contracts.like_query, lib=_library)

DECODE = torch.ops.zsmerge.less_decode.default
EXTEND = torch.ops.zsmerge.less_extend.default
