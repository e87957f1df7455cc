"""Many new tokens at once on CUDA: the rule of `reference.extend` by the prefill kernels. Imports triton.

A prompt on an empty cache takes its outputs from `scaled_dot_product_attention`; anything else, a window that is
shorter than the prompt and ALiBi included, from the flash-style kernel. Both then look at the felt queries again for
eq. 5, and fold the tokens into the cache.

The host waits for the device once a call, for the paddings and whether the rows' caches are empty.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zsmerge_compile.ops import reference, scores
from zsmerge_compile.ops.prefill import scored_queries
from zsmerge_compile.ops.state import Rule, State
from zsmerge_compile.ops.triton import blocks as table
from zsmerge_compile.ops.triton.extend_columns import columns_kernel
from zsmerge_compile.ops.triton.extend_rows import rows_kernel
from zsmerge_compile.ops.triton.launch_decode import INTERPRETED, check_contiguous, device_facts
from zsmerge_compile.ops.triton.launch_fold import fold


class Prompt(NamedTuple):
    """The rows of one call, and what the host knows of them."""

    query: Tensor  # [b, H, n, D]
    key: Tensor  # [b, G, n, D]
    value: Tensor  # [b, G, n, D]
    seen: Tensor  # [b] int64
    pads: Tensor  # [b] int64
    paddings: list[int]  # pads, on the host
    empty: bool  # nothing is held in any of the rows


def extend(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    blocks: table.ExtendBlocks | None = None,
) -> Tensor:
    """Attend with n columns and fold them into rows `rows` [b] of the cache, in place.

    query [b, H, n, D]; key, value [b, G, n, D]; seen [B] tokens in the cache; pads [b] leading padding columns.
    Returns out [b, H, n, D], zero at padding. Raises InputError where a state tensor is not contiguous.
    """
    check_contiguous(state)
    if blocks is None:
        arch = device_facts(query.device.index if query.is_cuda else None)[0]
        blocks = table.extend_blocks(query.element_size(), query.shape[3], arch)
    pads = pads.contiguous()
    mine = State(*(t.index_select(0, rows) for t in state))
    had = seen.index_select(0, rows)
    *paddings, held_any = torch.cat([pads, had.amax(0, keepdim=True)]).tolist()
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    prompt = Prompt(query, key, value, had, pads, paddings, held_any == 0)
    out, held, received = attend(mine, prompt, rule, blocks)
    columns = query.shape[2]
    score, received = scores.after_prompt(mine, held, received, had, pads, rule)
    folded = fold(mine._replace(score=score), key, value, received, had, pads, rule, prompt.empty, blocks)
    touched = pads < columns  # a row that is all padding keeps its state
    for buffer, new, old in zip(state, folded, mine, strict=True):
        if max(paddings) == columns:
            new = torch.where(touched.view(-1, *([1] * (new.dim() - 1))), new, old)
        buffer.index_copy_(0, rows, new)
    return out


def attend(state: State, prompt: Prompt, rule: Rule, blocks: table.ExtendBlocks) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.attend`: out [b, H, n, D], attention on slots [b, G, S] and on the new tokens [b, G, n]."""
    query, key = prompt.query, prompt.key
    b, heads, n, _ = query.shape
    felt = min(n, scored_queries(rule, heads // key.shape[1]))
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    plain = prompt.empty and rule.slopes is None and (rule.window is None or n <= rule.window)
    if plain:
        causal_attention(out, prompt, rule)
    first = n - felt if plain else 0
    bias, token_bias = biases(state, prompt, rule)
    tops, totals = query.new_empty((2, b, heads, n - first), dtype=torch.float32)
    if first < n:
        launch_rows(state, prompt, rule, blocks, bias, token_bias, out, tops, totals, first, want_out=not plain)
    held, received = torch.zeros_like(state.score), torch.zeros(b, key.shape[1], n, device=query.device)
    if felt == 0:
        return out, held, received
    late = slice(n - felt - first, None)
    discount = scores.discount(rule, torch.arange(felt - 1, -1, -1, device=query.device))
    shares = torch.where(totals[..., late] > 0, discount / totals[..., late], 0.0).contiguous()
    tops = tops[..., late].contiguous()
    launch_columns(state, prompt, rule, blocks, bias, token_bias, tops, shares, n - felt, held, received)
    return out, held, received


def causal_attention(out: Tensor, prompt: Prompt, rule: Rule) -> None:
    """Exact causal attention, rows of the same padding together, so no mask is built. Writes out [b, H, n, D]."""
    paddings, columns = prompt.paddings, prompt.query.shape[2]
    for pad in sorted(set(paddings) - {columns}):
        rows = [i for i, other in enumerate(paddings) if other == pad]
        members: list[int] | slice = slice(None) if len(rows) == len(paddings) else rows
        query, key, value = (t[members, :, pad:] for t in (prompt.query, prompt.key, prompt.value))
        grouped = query.shape[1] != key.shape[1]
        out[members, :, pad:] = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=rule.scale, enable_gqa=grouped
        )


def biases(state: State, prompt: Prompt, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """Of the slots, [b, G, S] (ALiBi: [b, H, S]), -inf where nothing is held; of the new tokens, [b, H, n] or None."""
    query, groups = prompt.query, prompt.key.shape[1]
    live = (state.weight > 0)[:, :, None]
    bias = reference.slot_biases(state, query.dtype, rule)[:, :, :, 0].masked_fill(~live, -torch.inf).flatten(1, 2)
    if rule.slopes is None:
        return bias.contiguous(), None
    at = prompt.seen[:, None] + torch.arange(query.shape[2], device=query.device) - prompt.pads[:, None]
    tokens = reference.token_biases(at, groups, query.dtype, rule)
    assert isinstance(tokens, Tensor)
    return bias.contiguous(), tokens[:, :, :, 0].flatten(1, 2).contiguous()


def launch_rows(
    state: State,
    prompt: Prompt,
    rule: Rule,
    blocks: table.ExtendBlocks,
    bias: Tensor,
    token_bias: Tensor | None,
    out: Tensor,
    tops: Tensor,
    totals: Tensor,
    first: int,
    *,
    want_out: bool,
) -> None:
    """The first phase for the queries from column `first` on; writes tops, totals and, if wanted, out."""
    query, key, value, seen, pads, _, empty = prompt
    b, heads, n, dim = query.shape
    rows, columns = block_sizes(blocks, n)
    grid = (b * heads * -(-(n - first) // rows),)
    rows_kernel[grid](
        query, key, value, state.key, state.value, bias, token_bias, state.position, seen, pads, out, tops, totals,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], bias.stride(0), bias.stride(1),
        heads // bias.shape[1], heads, heads // key.shape[1], n, first, 0 if empty else state.key.shape[2],
        rule.window or 0, rule.scale, OUT=want_out,
        **constants(dim, rows, columns, token_bias, rule, blocks),
    )  # fmt: skip


def launch_columns(
    state: State,
    prompt: Prompt,
    rule: Rule,
    blocks: table.ExtendBlocks,
    bias: Tensor,
    token_bias: Tensor | None,
    tops: Tensor,
    shares: Tensor,
    first: int,
    held: Tensor,
    received: Tensor,
) -> None:
    """The second phase: writes held [b, G, S] (unless the cache is empty) and received [b, G, n]."""
    query, key, _, seen, pads, _, empty = prompt
    b, heads, n, dim = query.shape
    rows, columns = block_sizes(blocks, n)
    slots = 0 if empty else state.key.shape[2]
    grid = (b * key.shape[1] * (-(-slots // columns) + -(-n // columns)),)
    columns_kernel[grid](
        query, key, state.key, bias, token_bias, state.position, seen, pads, tops, shares, held, received,
        *query.stride()[:3], *key.stride()[:3], bias.stride(0), bias.stride(1), heads // bias.shape[1],
        heads, heads // key.shape[1], n, first, slots, rule.window or 0, rule.scale,
        **constants(dim, rows, columns, token_bias, rule, blocks),
    )  # fmt: skip


def block_sizes(blocks: table.ExtendBlocks, n: int) -> tuple[int, int]:
    """Queries and keys at a time; `tl.dot` wants at least 16 of each on some versions."""
    return max(16, min(blocks.rows, table.power_of_two(n))), blocks.columns


def constants(
    dim: int, rows: int, columns: int, token_bias: Tensor | None, rule: Rule, blocks: table.ExtendBlocks
) -> dict[str, object]:
    """What both phases are specialised for."""
    return dict(
        D=dim,
        DP=table.padded_dim(dim),
        ROWS=rows,
        COLUMNS=columns,
        HAS_WINDOW=rule.window is not None,
        HAS_BIAS=token_bias is not None,
        STAGES=blocks.stages,
        INTERPRETED=INTERPRETED,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
