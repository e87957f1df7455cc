"""The layout that was weighed and not taken: ring, context and residual as caches of their own, one linear write each.

Made for TensorRT's KV-cache update layer, whose write index belongs to a batch entry: keys and values are
[B * G, 1, slots, D], so that every head has its own. Weights, scores and positions stay as they are, in one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zsmerge_compile.lower.kernels import decode_step
from zsmerge_compile.ops import decode, scores
from zsmerge_compile.ops.contracts import spelled
from zsmerge_compile.ops.state import LayerLayout, Rule, State, allocate

LAYOUT = LayerLayout(heads=4, kv_heads=2, head_dim=8, proximity=6, context=4, residual=2)
RULE = Rule(proximity=6, context=4, alpha=0.6, decay=0.98, scale=0.35)
BATCH = 2


def examples() -> tuple[Tensor, ...]:
    """query, key, value, seen, active of one token."""
    query = torch.randn(BATCH, LAYOUT.heads, 1, LAYOUT.head_dim)
    new = [torch.randn(BATCH, LAYOUT.kv_heads, 1, LAYOUT.head_dim) for _ in range(2)]
    return query, *new, torch.zeros(BATCH, dtype=torch.int64), torch.ones(BATCH, dtype=torch.bool)


class Scatter(nn.Module):
    """One layer's step, all slots in one tensor: (query, key, value, seen, active, *state) -> (out, *new state)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, active: Tensor, *state: Tensor) -> Any:
        new = [tensor.clone() for tensor in state]
        return decode_step(query, key, value, *new, seen, active, *spelled(RULE)), *new

    @staticmethod
    def state() -> tuple[Tensor, ...]:
        return tuple(allocate(LAYOUT, BATCH, torch.float32))


class Regions(nn.Module):
    """The same, with key and value each as ring, context and residual: six tensors in the place of two."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, active: Tensor, *given: Tensor) -> Any:
        keys, values, facts = given[:3], given[3:6], [tensor.clone() for tensor in given[6:]]
        state = State(torch.empty(0), torch.empty(0), *facts)
        at, alive = seen.to(torch.int32)[:, None, None], active[:, None, None]
        entering = (at % (RULE.proximity + 1)).expand(-1, key.shape[1], -1).long()
        is_new = decode.new_slot(state, entering)
        old_key, old_value = linear_read(keys[0], entering), linear_read(values[0], entering)
        ring_key = linear_write(keys[0], entering, torch.where(alive[..., None], key, old_key))
        ring_value = linear_write(values[0], entering, torch.where(alive[..., None], value, old_value))
        bias = decode.slot_bias(state, at, is_new, query.dtype, RULE)
        rows = query.reshape(keys[0].shape[0], 1, -1, query.shape[-1])
        parts = [rows @ part.mT for part in (ring_key, *keys[1:])]
        logits = torch.cat(parts, -1).view(*bias.shape[:2], -1, bias.shape[3]) * RULE.scale + bias
        attention = torch.softmax(logits, -1)
        split = attention.flatten(0, 1)[:, None].split([part.shape[2] for part in keys], -1)
        out = sum(a @ part for a, part in zip(split, (ring_value, *values[1:]), strict=True))
        mass = attention.sum(2)

        weight = torch.where(is_new, 1.0, state.weight)
        position = torch.where(is_new, at, state.position)
        score = scores.after_step(mass, state.score, weight, position, is_new, RULE)
        moves = decode.find_moves(weight, score, position, entering, at, RULE)
        assert moves.place is not None
        now = state._replace(weight=weight, score=score, position=position)
        place = moves.place - (RULE.proximity + 1)
        pairs = [(linear_read(ring, moves.leaving), linear_read(context, place))
                 for ring, context in ((ring_key, keys[1]), (ring_value, values[1]))]  # fmt: skip
        takes = (moves.promoted & alive)[..., None]
        new_context = [linear_write(part, place, torch.where(takes, *pair)) for part, pair in
                       zip((keys[1], values[1]), pairs, strict=True)]  # fmt: skip
        facts_of = [[t.gather(2, torch.cat([moves.leaving, moves.place], 2))[:, :, n : n + 1] for n in (0, 1)]
                    for t in (weight, score, position)]  # fmt: skip
        promoted = moves.promoted
        victim = [torch.where(promoted, pair[1], pair[0]) for pair in facts_of]
        content = [torch.where(promoted[..., None], pair[1], pair[0]).float() for pair in pairs]
        happens = moves.leaves & (victim[0] > 0) & alive
        slot, merged = decode.merge(state, now, *content, victim[1], victim[2], happens)
        chosen = slot - (weight.shape[2] - LAYOUT.residual)
        new_residual = [linear_write(part, chosen, torch.where(happens[..., None], mean, linear_read(part, chosen)))
                        for part, mean in zip((keys[2], values[2]), merged[:2], strict=True)]  # fmt: skip
        index = torch.cat([entering, moves.leaving, moves.place, slot], 2)
        zero = torch.zeros_like(victim[0])
        (w0, w1), (s0, s1), (p0, p1) = facts_of
        for buffer, whole, parts in (
            (state.weight, weight, [weight.gather(2, entering), zero, torch.where(promoted, w0, w1), merged[2]]),
            (state.score, score, [score.gather(2, entering), zero, torch.where(promoted, s0, s1), merged[3]]),
            (state.position, position, [position.gather(2, entering), p0, torch.where(promoted, p0, p1), merged[4]]),
        ):
            buffer.copy_(torch.where(alive, whole.scatter(2, index, torch.cat(parts, 2)), buffer))
        shown = out.view(query.shape)
        return shown, ring_key, new_context[0], new_residual[0], ring_value, new_context[1], new_residual[1], *facts

    @staticmethod
    def state() -> tuple[Tensor, ...]:
        whole = allocate(LAYOUT, BATCH, torch.float32)
        sizes = [LAYOUT.proximity + 1, LAYOUT.context, LAYOUT.residual]
        heads = [part.flatten(0, 1)[:, None].clone() for t in whole[:2] for part in t.split(sizes, 2)]
        return *heads, *whole[2:]


def linear_read(cache: Tensor, index: Tensor) -> Tensor:
    """Slot index[b, g, 0] of every head of cache [B * G, 1, slots, D]: [B, G, 1, D]."""
    wide = index.reshape(-1, 1, 1, 1).expand(-1, -1, -1, cache.shape[3])
    return cache.gather(2, wide).view(*index.shape, cache.shape[3])


def linear_write(cache: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """new [B, G, 1, D] in slot index[b, g, 0] of every head: what the update layer would do in place."""
    wide = index.reshape(-1, 1, 1, 1).expand(-1, -1, -1, cache.shape[3])
    return cache.scatter(2, wide, new.reshape(-1, 1, 1, cache.shape[3]))


def whole(results: Any) -> list[Tensor]:
    """What `Regions` returns, as `Scatter` returns it."""
    heads = (BATCH, LAYOUT.kv_heads)
    joined = [torch.cat([part.view(*heads, *part.shape[2:]) for part in results[n : n + 3]], 2) for n in (1, 4)]
    return [results[0], *joined, *results[7:]]
