"""A full cache without a prompt: random content in every slot, in a state that decoding could have reached.

How long a step takes depends on how many slots are live, not on what they hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zsmerge_compile.ops.state import State

MERGED = 7.0  # tokens in every residual slot


def fill(state: State, proximity: int, seen: int, seed: int = 0) -> None:
    """Make every slot of one layer's empty state live as after `seen` tokens, but the ring slot of the next one.

    The ring holds the latest `proximity` tokens, the context older ones, the residual merged ones. Scores are far
    enough apart that the next steps' decisions don't hang on rounding: every other token that leaves the ring is
    promoted. `seen` must be at least the slots.
    """
    slots, residual, ring = state.weight.shape[2], state.opened.shape[2], proximity + 1
    context = slots - ring - residual
    device = state.key.device
    random = torch.Generator(device=device).manual_seed(seed)
    for buffer in (state.key, state.value, state.residual_key, state.residual_value):
        buffer.normal_(generator=random)
    first = slots - residual
    state.key[:, :, first:] = state.residual_key.to(state.key.dtype)
    state.value[:, :, first:] = state.residual_value.to(state.value.dtype)

    at = torch.arange(ring, device=device)
    tokens = seen - 1 - (seen - 1 - at) % ring  # the latest token of each ring slot
    state.position[:, :, :ring] = tokens.to(torch.int32)
    state.position[:, :, ring:first] = torch.arange(context, device=device, dtype=torch.int32) + residual
    state.position[:, :, first:] = torch.arange(residual, device=device, dtype=torch.int32)
    state.residual_position.copy_(state.position[:, :, first:])
    state.opened.copy_(torch.arange(residual, device=device, dtype=torch.int32) + 1)
    state.weight.fill_(1.0)
    state.weight[:, :, first:] = MERGED
    state.weight[:, :, seen % ring] = 0.0
    _scores(state, ring, first, tokens, random)


def _scores(state: State, ring: int, first: int, tokens: Tensor, random: torch.Generator) -> None:
    batch, groups, slots = state.weight.shape
    device = state.weight.device
    order = torch.rand(batch, groups, first - ring, generator=random, device=device).argsort(-1)
    rank = order.float()
    state.score[:, :, ring:first] = torch.where(rank < 64, 0.2 + rank / 64, 2.0 + rank / max(1, first - ring))
    state.score[:, :, :ring] = torch.where(tokens % 2 == 0, 3.0, 0.05)
    state.score[:, :, first:] = torch.rand(batch, groups, slots - first, generator=random, device=device)
    state.score[state.weight == 0] = 0.0
