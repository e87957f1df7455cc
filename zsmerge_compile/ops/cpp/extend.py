"""Many new tokens at once with the C++ operators: blocks of queries that stay in the caches, no Python loop.

`zsmerge_cpp::extend` has the schema of `zsmerge::extend` and does the same. For a prompt on an empty cache
`scaled_dot_product_attention` gives the outputs of the early queries, and the pass that scores the late ones theirs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.ops import contracts, prefill, reference
from zsmerge_compile.ops.cpp import build
from zsmerge_compile.ops.fold import Residual
from zsmerge_compile.ops.state import Rule, State


def extend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`zsmerge::extend` on CPU tensors as one opaque call; a Kernel's `run`. Raises MissingBackendError."""
    return operator()(query, key, value, *rest)


@functools.cache
def operator() -> Any:
    """`zsmerge_cpp::extend`, registered when first asked for."""
    build.load()
    schema = contracts.EXTEND._schema
    library = torch.library.Library("zsmerge_cpp", "FRAGMENT")
    library.define(str(schema).replace("zsmerge::", "", 1))
    library.impl("extend", _extend, "CPU")
    torch.library.register_fake("zsmerge_cpp::extend", contracts.like_query, lib=library)
    _LIBRARIES.append(library)
    return torch.ops.zsmerge_cpp.extend.default


_LIBRARIES: list[torch.library.Library] = []  # a library that is collected takes its operators with it


def _extend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    state, (rows, seen, pads), rule = State(*rest[:9]), rest[9:12], Rule(*rest[12:])
    return prefill.extend(state, query, key, value, rows, seen, pads, rule, PARTS)


def blocks(
    state: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    pads: Tensor,
    rule: Rule,
    *,
    first: int,
    want_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.prefill.blocks`, logits in fp32 whatever the dtype; the outputs come along, wanted or not."""
    groups, slots = state.weight.shape[1:]
    slot_bias = reference.slot_biases(state, query.dtype, rule)[:, :, :, 0]
    at = seen[:, None] + torch.arange(query.shape[2]) - pads[:, None]
    new_bias = reference.token_biases(at, groups, query.dtype, rule)
    out, mass = torch.ops.zsmerge.prompt_attention(
        query,
        key,
        value,
        state.key,
        state.value,
        slot_bias.masked_fill((state.weight == 0)[:, :, None], -torch.inf),
        state.position,
        None if isinstance(new_bias, float) else new_bias[:, :, :, 0],
        seen,
        pads,
        first,
        rule.window,
        rule.scale,
        rule.decay if rule.scoring == "received" else 1.0,
    )
    return out, mass[..., :slots], mass[..., slots:]


def in_turn(residual: Residual, arrivals: Residual) -> Residual:
    """As `ops.fold.in_turn`."""
    kept = Residual(*(tensor.clone(memory_format=torch.contiguous_format) for tensor in residual))
    torch.ops.zsmerge.absorb(*kept, *(tensor.contiguous() for tensor in arrivals[:6]))
    return kept


PARTS = prefill.Parts(blocks, in_turn, late_out=True)
