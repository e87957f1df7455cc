"""Launching the two decode kernels. Importing this imports triton.

No host synchronisation and no allocation that depends on data, so a step can be captured as a CUDA graph: the scratch
comes from the graph's pool. The first launch of a shape compiles, so a step must be run once before it is captured.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from zsmerge_compile.errors import InputError, must
from zsmerge_compile.ops.state import Rule, State
from zsmerge_compile.ops.triton import blocks as table
from zsmerge_compile.ops.triton.decode_finish import finish_kernel
from zsmerge_compile.ops.triton.decode_split import split_kernel
from zsmerge_compile.ops.triton.supports import SCORINGS

INTERPRETED = type(split_kernel).__name__ == "InterpretedFunction"


@functools.cache
def device_facts(index: int | None) -> tuple[int, int]:
    """Architecture (80, 90, ...) and number of multiprocessors; of a device that is no GPU, 0 and 1."""
    if index is None:
        return 0, 1
    found = torch.cuda.get_device_properties(index)
    return found.major * 10 + found.minor, found.multi_processor_count


def decode_plan(query: Tensor, state: State) -> table.DecodePlan:
    """The blocks and the grid of one step."""
    rows, groups, slots, dim = state.key.shape
    group = query.shape[1] // groups
    arch, processors = device_facts(query.device.index if query.is_cuda else None)
    chosen = table.decode_blocks(query.element_size(), dim, group, arch)
    return table.plan(chosen, rows * groups, slots, group, processors)


def decode(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    active: Tensor,
    rule: Rule,
    plan: table.DecodePlan | None = None,
) -> Tensor:
    """One decode step, in place: query [B, H, 1, D], key and value [B, G, 1, D], seen [B] int64, active [B] bool.

    Returns out [B, H, 1, D]; of rows that are not active the state is untouched and the output zero. Raises InputError
    where a state tensor is not contiguous.
    """
    check_contiguous(state)
    plan = plan or decode_plan(query, state)
    blocks = plan.blocks
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    rows, heads, _, dim = query.shape
    groups, slots, residual = state.key.shape[1], state.key.shape[2], state.opened.shape[2]
    group, pairs, splits = heads // groups, rows * groups, plan.splits
    padded = -(-slots // 32) * 32  # whole cache lines
    out = torch.empty((rows, heads, 1, dim), dtype=query.dtype, device=query.device)
    logits, part_max, part_sum, part_out, low_score = (
        torch.empty((pairs, *shape), dtype=torch.float32, device=query.device)
        for shape in ((group, padded), (group, splits), (group, splits), (group, splits, dim), (plan.tiles,))
    )
    low_position, low_slot, tickets = (
        torch.empty((pairs, width), dtype=torch.int32, device=query.device) for width in (plan.tiles, plan.tiles, 1)
    )
    seen, alive = seen.contiguous(), active.contiguous().view(torch.uint8)
    window = 0 if rule.window is None else rule.window
    entry = (key.stride(0), key.stride(1), value.stride(0), value.stride(1))
    shape = dict(R=group, D=dim, DP=table.padded_dim(dim), INTERPRETED=INTERPRETED, HAS_WINDOW=rule.window is not None)
    heads_each = table.heads_of(blocks, group)
    split_kernel[(pairs * -(-group // heads_each), splits)](
        query, key, value, state.key, state.value, state.weight, state.position, state.residual_position, rule.slopes,
        seen, alive, logits, part_max, part_sum, part_out, tickets, query.stride(0), query.stride(1), *entry,
        groups, slots, residual, rule.proximity + 1, window, plan.chunk, padded,
        rule.alpha, rule.scale, rule.alibi_divisor,
        HEADS=heads_each, BLOCK=blocks.block, STAGES=blocks.stages, BRANCH=blocks.branch,
        ALIBI=rule.slopes is not None, ALIBI_BF16=rule.alibi_bf16, num_warps=blocks.warps, num_stages=blocks.stages,
        **shape,
    )  # fmt: skip
    finish_kernel[(pairs, plan.tiles)](
        logits, part_max, part_sum, part_out, tickets, low_score, low_position, low_slot, out, key, value, *state,
        seen, alive, *entry, groups, slots, residual, rule.proximity + 1, rule.context, window, splits, padded,
        rule.decay,
        RB=min(table.power_of_two(group), max(1, 4096 // blocks.tile)), TILE=blocks.tile,
        TP=table.power_of_two(plan.tiles), SP=table.power_of_two(splits), SB=min(32, table.power_of_two(splits)),
        RESIDUAL_BLOCK=min(blocks.residual_block, table.power_of_two(residual)),
        HAS_CONTEXT=rule.context > 0, HAS_RESIDUAL=residual > 0, SCORING=SCORINGS.index(rule.scoring),
        num_warps=blocks.finish_warps,
        **shape,
    )  # fmt: skip
    return out


def check_contiguous(state: State) -> None:
    """The kernels address the state by shape alone."""
    for name, tensor in zip(State._fields, state, strict=True):
        if not tensor.is_contiguous():
            raise InputError(must(f"the cache's {name}", "contiguous", f"strides {tensor.stride()}"))
