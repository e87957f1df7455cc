"""CaM: the value of a token that leaves the cache is given to the oldest of the tokens that are newer and stay.

    p_i = clamp(A_i / mean(A over those m), 0, 1);  M_i ~ Bernoulli(p_i), or p_i itself where there is no seed
    v_j = v_j + sum_i M_i v_i / m    for those m tokens j, i over the tokens that leave;  their keys are dropped

A is the attention of the last query, summed over the query heads of the group. With scores of "age" a token that
leaves is older than all of the ring, so that the m tokens are the ring's oldest, the same for all that leave at once.
A ring of fewer than m tokens takes as many m-th parts. Shapes: b rows, G key/value heads, n new tokens, S slots, D
head dim, c = min(m, proximity) tokens that take.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zsmerge_compile.ops.state import Rule
from zsmerge_compile.ops.tokens import Tokens

WORD = 2**32 - 1
SMALLEST = torch.finfo(torch.float32).tiny


def merge(
    ring: Tokens, victims: Tokens, attention: tuple[Tensor, Tensor], seen: Tensor, pads: Tensor, rule: Rule
) -> Tokens:
    """The ring with what the victims of a call with n new tokens give to it.

    attention: what the slots [b, G, S] and the new tokens [b, G, n] received; seen [b], pads [b] as for `fold`.
    """
    size = rule.proximity + 1
    received = torch.cat([attention[0][:, :, :size], attention[1]], 2)
    seen, first = seen[:, None, None], (size + pads - seen)[:, None, None]

    def of(tokens: Tokens) -> Tensor:
        """What they received, 0 at holes: tokens seen before lie in the ring, the others are new."""
        place = torch.where(tokens.position < seen, tokens.position % size, tokens.position + first).long()
        live = tokens.weight > 0
        return torch.where(live, received.gather(2, torch.where(live, place, 0)), 0.0)

    after = seen + attention[1].shape[2] - pads[:, None, None]
    count = min(rule.merged, rule.proximity)
    takes = (ring.weight > 0) & (ring.position < after - rule.proximity + count)
    mean = torch.where(takes, of(ring), 0.0).sum(2, keepdim=True) / count
    share = shares(of(victims), mean, victims.position, rule)
    given = (torch.where(victims.weight > 0, share, 0.0)[..., None] * victims.value.float()).sum(2, keepdim=True)
    merged = (ring.value.float() + given).to(ring.value.dtype)
    return ring._replace(value=torch.where(takes[..., None], merged, ring.value))


class Gift(NamedTuple):
    """What one decoded token makes the token that leaves give away."""

    slots: Tensor  # [B, G, k] of the tokens that take, but for the new one
    share: Tensor  # [B, G, 1] M / m, 0 where none leaves
    to_new: bool  # the new token takes too

    def added(self, value: Tensor, victim: Tensor) -> Tensor:
        """value [B, G, k, D] with its part of victim [B, G, 1, D]."""
        return (value.float() + self.share[..., None] * victim.float()).to(value.dtype)


def gift(mass: Tensor, leaving: Tensor, leaves: Tensor, at: Tensor, rule: Rule) -> Gift:
    """A step's: mass [B, G, S] is its attention, leaving [B, G, 1] the victim's ring slot, at [B, 1, 1] its token."""
    count = min(rule.merged, rule.proximity)
    slots = (leaving + 1 + torch.arange(count, device=leaving.device)) % (rule.proximity + 1)
    mean = mass.gather(2, slots).sum(2, keepdim=True) / count
    share = shares(mass.gather(2, leaving), mean, (at - rule.proximity).expand_as(leaving), rule)
    to_new = count == rule.proximity
    return Gift(slots[:, :, : count - to_new], torch.where(leaves, share, 0.0), to_new)


def shares(received: Tensor, mean: Tensor, position: Tensor, rule: Rule) -> Tensor:
    """M / m of tokens at `position` [b, G, n], the mean attention of those that take being `mean` [b, G, 1]."""
    p = (received / mean.clamp_min(SMALLEST)).clamp(0.0, 1.0)
    if rule.seed is not None:
        p = (uniform(rule.seed, position) < p).float()
    return p / rule.merged


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Numbers in [0, 1), of the seed [1], the head and the position [b, G, n] alone: the same wherever computed."""
    head = torch.arange(position.shape[1], device=position.device)[:, None]
    return (mixed(mixed(seed + head) ^ position.long()) >> 8).float() / 2**24


def mixed(number: Tensor) -> Tensor:
    """A 32-bit hash of 32-bit numbers held in int64 (Wellons, "lowbias32"); no product overflows."""
    number = number & WORD
    number = number ^ (number >> 16)
    number = (number * 0x7FEB352D) & WORD
    number = number ^ (number >> 15)
    number = (number * (0x846CA68B - 2**32)) & WORD
    return number ^ (number >> 16)


def layer_seed(seed: int, layer: int) -> Tensor:
    """The seed of a layer, [1] int64."""
    return mixed(mixed(torch.tensor([seed])) + layer)
