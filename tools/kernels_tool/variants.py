"""The layers of `shapes.py` as states and rules, and the kernels' launches on tensors without memory."""

from __future__ import annotations

import torch

from kernels_tool.compiling import Launch, recording
from kernels_tool.shapes import Shape
from zsmerge_compile.ops.state import LayerLayout, Rule, State, allocate
from zsmerge_compile.ops.triton import blocks, launch_decode, launch_extend, launch_fold

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def layer(
    shape: Shape, dtype: torch.dtype, budget: int, batch: int, device: str, merge: str = "segment"
) -> tuple[State, Rule]:
    """An empty cache of `budget` slots and its constants, by the package's default shares."""
    proximity = budget // 2
    residual = max(1, round(0.02 * (budget - proximity)))
    layout = LayerLayout(
        shape.heads, shape.kv_heads, shape.head_dim, proximity, budget - proximity - residual, residual, shape.window
    )
    slopes = torch.ones(shape.heads, device=device) if shape.alibi else None
    scale, divisor = shape.head_dim**-0.5, shape.head_dim**0.5
    rule = Rule(
        proximity, layout.context, 0.6, 0.98, scale, shape.window, merge, slopes, divisor, alibi_bf16=shape.alibi
    )
    return allocate(layout, batch, dtype, device), rule


def launches(shape: Shape, dtype: torch.dtype, processors: int, budget: int = 4096, n: int = 512) -> list[Launch]:
    """Every launch of a decode step and of a chunk of n tokens by each merge rule, at batch 1."""
    found: list[Launch] = []
    for merge in ("segment", "sequential"):
        state, rule = layer(shape, dtype, budget, 1, "meta", merge)
        with recording((launch_decode, launch_extend, launch_fold)) as made:
            if merge == "segment":
                _decode(shape, dtype, state, rule, processors)
            _extend(shape, dtype, state, rule, n)
        found += made
    return found


def _tokens(shape: Shape, dtype: torch.dtype, n: int) -> list[torch.Tensor]:
    return [
        torch.empty(1, heads, n, shape.head_dim, dtype=dtype, device="meta")
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]


def _decode(shape: Shape, dtype: torch.dtype, state: State, rule: Rule, processors: int) -> None:
    group, size = shape.heads // shape.kv_heads, dtype.itemsize
    chosen = blocks.rule(size, shape.head_dim, group)
    plan = blocks.plan(chosen, shape.kv_heads, state.key.shape[2], group, processors)
    seen, active = (torch.empty(1, dtype=d, device="meta") for d in (torch.int64, torch.bool))
    launch_decode.decode(state, *_tokens(shape, dtype, 1), seen, active, rule, plan)


def _extend(shape: Shape, dtype: torch.dtype, state: State, rule: Rule, n: int) -> None:
    """On a filled cache, so that every prefill kernel is launched."""
    query, key, value = _tokens(shape, dtype, n)
    whole = torch.empty(1, dtype=torch.int64, device="meta")
    chosen = blocks.extend_rule(dtype.itemsize, shape.head_dim)
    prompt = launch_extend.Prompt(query, key, value, whole, whole, [0], empty=False)
    _, _, received = launch_extend.attend(state, prompt, rule, chosen)
    launch_fold.fold(state, key, value, received, whole, whole, rule, False, chosen)
