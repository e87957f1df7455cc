"""KVMerger: tokens in a row with keys alike become one slot.

Cut between the adjacent keys whose cosine is at most `threshold` ("threshold"), of these between the slots - 1 lowest
if there are more, or between the slots - 1 lowest of all ("fixed"). A set S with the pivot p, its highest score:

    g_i = exp(-||k_p - k_i||^2 / (2 sigma^2));  w_i = g_i / sum g
    key = sum w_i k_i;  value = |S| sum w_i v_i, or without |S| if `normalized`

Shapes: b rows, G key/value heads, n tokens, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zsmerge_compile.ops.state import Rule
from zsmerge_compile.ops.tokens import Tokens

SETS = ("threshold", "fixed")


def merge(tokens: Tokens, slots: int, rule: Rule) -> Tokens:
    """The tokens, oldest first and holes last, as at most `slots` sets: weights and scores add up.

    A set's position is that of its newest member. Slots that hold merged tokens may be among the tokens: each counts
    as one member. Of equal cosines the older is cut, of equal scores the newer is the pivot.
    """
    live = tokens.weight > 0
    key, value = tokens.key.float(), tokens.value.float()
    number = torch.where(live, numbers(key, live, slots, rule), slots)  # holes in a set that is left out
    shape, device = (*number.shape[:2], slots + 1), number.device

    def total(t: Tensor) -> Tensor:
        return torch.zeros(shape, device=device).scatter_add(2, number, t)

    def total_rows(t: Tensor) -> Tensor:
        empty = torch.zeros(*shape, t.shape[3], device=device)
        return empty.scatter_add(2, number[..., None].expand_as(t), t)

    pivot = pivots(tokens.score, number, slots).gather(2, number)
    away = (key - key.gather(2, pivot[..., None].expand_as(key))).square().sum(-1)
    nearness = torch.where(live, torch.exp(-away / (2 * rule.sigma**2)), 0.0)
    share = (nearness / total(nearness).gather(2, number).clamp_min(1.0))[..., None]  # the pivot's own is 1
    members = 1.0 if rule.normalized else total(live.float())[..., None]
    newest = torch.zeros(shape, dtype=torch.int32, device=device).scatter_reduce(
        2, number, torch.where(live, tokens.position, 0), "amax"
    )
    merged = Tokens(
        total_rows(share * key).to(tokens.key.dtype),
        (total_rows(share * value) * members).to(tokens.value.dtype),
        total(tokens.weight),
        total(tokens.score),
        newest,
    )
    return Tokens(*(t[:, :, :slots] for t in merged))


def numbers(key: Tensor, live: Tensor, slots: int, rule: Rule) -> Tensor:
    """The number of each token's set, 0 .. slots - 1: [b, G, n] int64."""
    unit = F.normalize(key, dim=-1)
    alike = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)
    parts = live[:, :, 1:] if rule.sets == "fixed" else live[:, :, 1:] & (alike <= rule.threshold)
    lowest = torch.where(parts, alike, torch.inf).argsort(dim=2, stable=True)[..., : slots - 1]
    cut = torch.zeros_like(alike, dtype=torch.int64).scatter(2, lowest, parts.gather(2, lowest).long())
    return F.pad(cut.cumsum(2), (1, 0))


def pivots(score: Tensor, number: Tensor, slots: int) -> Tensor:
    """Which token is each set's pivot: [b, G, slots + 1] int64."""
    shape, index = (*number.shape[:2], slots + 1), torch.arange(number.shape[2], device=number.device)
    highest = torch.full(shape, -torch.inf, device=number.device).scatter_reduce(2, number, score, "amax")
    best = torch.where(score == highest.gather(2, number), index, 0)
    return torch.zeros(shape, dtype=torch.int64, device=number.device).scatter_reduce(2, number, best, "amax")
