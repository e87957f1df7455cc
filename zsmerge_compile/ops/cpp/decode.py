"""The decode step with attention in C++: K and V are read once, by rows, and only where a slot is live."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.ops import decode
from zsmerge_compile.ops.cpp import build
from zsmerge_compile.ops.state import Rule, State


def decode_step(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`zsmerge::decode` on CPU tensors; a Kernel's `run` (see `lower.kernels`). Raises MissingBackendError."""
    build.load()
    size = len(State._fields)
    seen, active = rest[size : size + 2]
    rule = Rule(*rest[size + 2 :])
    return decode.step(State(*rest[:size]), query, key, value, seen, active, rule, attend)


def attend(
    state: State, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, entering: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """As `ops.decode.attend`, logits and sums in fp32 whatever the dtype."""
    batch, heads, _, dim = query.shape
    groups = key.shape[1]
    out, mass = torch.ops.zsmerge.scored_attention(
        query.reshape(batch, groups, heads // groups, dim),
        state.key,
        state.value,
        bias,
        key[:, :, 0],
        value[:, :, 0],
        entering[:, 0, 0],
        rule.scale,
    )
    return out.view(batch, heads, 1, dim), mass
