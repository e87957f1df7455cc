"""The seam for kernels: which implementation of a cache op a compiled graph calls, chosen by op, device and shape.

A kernel is a Python function of tensors with the op's arguments, traced into the graph that is compiled; it may be
aten nodes or the call of another op. The choice is never silent: `CompiledModel.report.kernels` names it.

| device | decode | extend |
| --- | --- | --- |
| CPU | attention in C++, the rest compiled around it | SDPA; scores, chunks and merging in C++ |
| CUDA | two Triton kernels | SDPA and Triton kernels |
| others, and shapes Triton does not serve | aten nodes, compiled | the op itself: SDPA, blocks of matrix products |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsmerge_compile.ops import contracts, decode, less, scan
from zsmerge_compile.ops.state import Rule, State
from zsmerge_compile.program import Program


class Kernel(NamedTuple):
    """A traceable implementation and its name in reports."""

    name: str
    run: Callable[..., Tensor]


def choose(op: Any, program: Program) -> Kernel:
    """The kernel for `op` in this program's graphs. Raises MissingBackendError where it cannot be built."""
    device = program.device.type
    if op not in (contracts.DECODE, contracts.EXTEND) or device not in ("cpu", "cuda"):
        return _plain(op)
    if device == "cpu":
        return _cpp(op)
    refused = _triton_refuses(program)
    return _triton(op) if refused is None else _plain(op, f", not Triton: {refused}")


def decode_step(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`zsmerge::decode` as the functional step plus one `index_put_` per buffer, in aten nodes."""
    size = len(State._fields)
    seen, active = rest[size : size + 2]
    return decode.step(State(*rest[:size]), query, key, value, seen, active, Rule(*rest[size + 2 :]))


def standard(op: Any) -> Callable[..., Tensor]:
    """A cache op in PyTorch's own operators, which every exporter knows: in place, prompts by the scan operator."""
    known = {
        contracts.DECODE: decode_step,
        contracts.EXTEND: scan.extend_step,
        less.DECODE: less.decode_step,
        less.EXTEND: less.extend_step,
    }
    return known[op]


def _plain(op: Any, why: str = "") -> Kernel:
    if op in (contracts.DECODE, less.DECODE):
        file = "ops.decode" if op is contracts.DECODE else "ops.less"
        return Kernel(f"{file} (aten nodes, compiled{why})", standard(op))
    return Kernel(f"{op} (one opaque call{why})", op)


def _cpp(op: Any) -> Kernel:
    from zsmerge_compile.ops.cpp.decode import decode_step
    from zsmerge_compile.ops.cpp.extend import extend

    if op is contracts.DECODE:
        return Kernel("ops.cpp (attention in C++, the rest compiled)", decode_step)
    return Kernel("ops.cpp (SDPA; scores, chunks and merging in C++)", extend)


def _triton(op: Any) -> Kernel:
    from zsmerge_compile.ops.triton import ops

    if op is contracts.DECODE:
        return Kernel("ops.triton (split and finish kernels)", ops.decode_step)
    return Kernel("ops.triton (SDPA, scores and merging in Triton)", ops.extend)


def _triton_refuses(program: Program) -> str | None:
    """Why Triton cannot serve some layer, in words; None if it serves all."""
    from zsmerge_compile.ops.triton.supports import SCORINGS, supports

    if program.policy.merges_context:
        return f"the merging of {program.policy.name}"
    if program.policy.places != "text":
        return "positions by place"
    if program.policy.scoring not in SCORINGS:
        return f"scores of kind {program.policy.scoring}"
    capability = torch.cuda.get_device_capability(program.device)
    shapes = {(layout.head_dim, layout.heads, layout.kv_heads) for layout in program.layouts}
    reasons = (supports(program.dtype, *shape, capability) for shape in sorted(shapes))
    return next((reason for reason in reasons if reason is not None), None)
