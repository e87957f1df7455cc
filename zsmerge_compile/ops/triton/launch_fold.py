"""What the cache keeps of n new tokens, on CUDA: `ops/fold.py` with K and V moved by kernels. Imports triton.

Who stays where is decided by `fold.sort_out` on the tokens' names instead of their keys and values: no key is sorted,
concatenated or widened. Nothing here makes the host wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zsmerge_compile.ops.fold import Residual, open_residual, opened_at_once, sort_out
from zsmerge_compile.ops.state import Rule, State
from zsmerge_compile.ops.tokens import Tokens
from zsmerge_compile.ops.triton import blocks as table
from zsmerge_compile.ops.triton.extend_absorb import absorb_kernel
from zsmerge_compile.ops.triton.extend_merge import gather_kernel, segments_kernel


def fold(
    state: State,
    key: Tensor,
    value: Tensor,
    received: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    empty: bool,
    blocks: table.ExtendBlocks,
) -> State:
    """Move n new tokens [b, G, n, D] with scores `received` [b, G, n] into the cache.

    empty: no row holds anything, known to the caller. Returns new tensors; may overwrite `state`'s masters.
    """
    singles = rule.proximity + 1 + rule.context
    names = torch.arange(singles + key.shape[2], device=key.device).expand(*key.shape[:2], -1)[..., None]
    ring, context, victims, after = sort_out(state, names, names, received, seen, pads, rule)
    source = Source(state, key, value, singles)
    residual = open_residual(state, after, rule.window)
    if residual.weight.shape[2]:
        residual = absorb(residual, victims, source, rule.merge, empty, blocks)
    return join(ring, context, residual, source)


class Source:
    """Where named tokens lie: below `singles` in the state's slots, from there on among the new tokens."""

    def __init__(self, state: State, key: Tensor, value: Tensor, singles: int) -> None:
        self.state, self.key, self.value, self.singles = state, key, value, singles
        self.dim = key.shape[3]
        self.pairs = key.shape[0] * key.shape[1]

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.key.stride()[:3], *self.value.stride()[:3], self.key.shape[1])


def join(ring: Tokens, context: Tokens, residual: Residual, source: Source) -> State:
    """The three parts as one state; residual slots show their masters, rounded."""
    state, singles = source.state, source.singles
    key, value = torch.empty_like(state.key), torch.empty_like(state.value)
    index = torch.cat([ring.key, context.key], 2)[..., 0].contiguous()
    block = 32
    gather_kernel[(source.pairs * -(-singles // block),)](
        index, state.key, state.value, source.key, source.value, key, value, *source.strides,
        key.shape[2], singles, singles, D=source.dim, DP=table.padded_dim(source.dim), BLOCK=block,
    )  # fmt: skip
    key[:, :, singles:], value[:, :, singles:] = residual.key, residual.value
    return State(
        key,
        value,
        torch.cat([ring.weight, context.weight, residual.weight], 2),
        torch.cat([ring.score, context.score, residual.score], 2),
        torch.cat([ring.position, context.position, residual.position], 2),
        residual.key,
        residual.value,
        residual.mean,
        residual.opened,
    )


def absorb(
    residual: Residual, victims: Tokens, source: Source, merge: str, empty: bool, blocks: table.ExtendBlocks
) -> Residual:
    """Take in the victims (oldest first): one by one, or as the means of contiguous near-equal groups."""
    index = victims.key[..., 0].contiguous()
    count = (victims.weight > 0).sum(2).to(torch.int32)
    score, position = victims.score.contiguous(), victims.position.contiguous()
    residual = Residual(*(t.contiguous() for t in residual))
    weights: Tensor | None = None
    means: Tensor | None = None
    old_key, old_value = source.state.key, source.state.value
    if merge == "segment":
        arrivals = segments(index, count, score, position, residual, source)
        if empty:
            return opened_at_once(residual, arrivals)
        weights, means = arrivals.weight, arrivals.mean
        old_key, old_value, score, position = arrivals.key, arrivals.value, arrivals.score, arrivals.position
        count = count.clamp_max(residual.weight.shape[2])
    size, wide = residual.weight.shape[2], table.padded_dim(source.dim)
    keys = table.power_of_two(size) * wide  # numbers to hold, if all masters' keys are held
    absorb_kernel[(source.pairs,)](
        None if merge == "segment" else index, count, weights, score, position, means, old_key, old_value,
        source.key, source.value, residual.weight, residual.score, residual.position, residual.key, residual.value,
        residual.mean, residual.opened, *source.strides, old_key.shape[2], source.singles, score.shape[2], size,
        D=source.dim, DP=wide, RP=table.power_of_two(size), BLOCK=min(blocks.residual_block, table.power_of_two(size)),
        SINGLE=merge != "segment", HELD=keys <= blocks.held_keys, num_warps=max(4, min(8, keys // 2048)),
    )  # fmt: skip
    return residual


def segments(
    index: Tensor, count: Tensor, score: Tensor, position: Tensor, residual: Residual, source: Source
) -> Residual:
    """The victims as min(count, R) contiguous groups, the first ones larger by one; each as its mean."""
    means = Residual(*(torch.empty_like(t) for t in residual))
    size = residual.weight.shape[2]
    segments_kernel[(source.pairs * size,)](
        index, count, score, position, source.state.key, source.state.value, source.key, source.value,
        means.key, means.value, means.weight, means.score, means.mean, means.position, *source.strides,
        source.state.key.shape[2], source.singles, index.shape[2], size,
        D=source.dim, DP=table.padded_dim(source.dim), BLOCK=32,
    )  # fmt: skip
    return means._replace(opened=means.position)
