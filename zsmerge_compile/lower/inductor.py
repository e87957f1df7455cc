"""Inductor: one static decode graph and one dynamic prefill graph, compiled without Dynamo in front.

The graphs are already traced, so AOTAutograd and Inductor take them directly: a call has no guards to check and can
never recompile. The decode op is expanded to its kernel (see `kernels`), whose writes Inductor does in place.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from zsmerge_compile.lower import kernels
from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.program import Program


def lower(program: Program) -> Lowered:
    """Compile both graphs; returns when the code is ready."""
    policy, device = program.policy, program.device.type
    chosen = {op: kernels.choose(op, device) for op in (policy.decode_op, policy.extend_op)}
    names = {op: kernel.name if kernel else f"{op} (one opaque call)" for op, kernel in chosen.items()}
    state = [tensor for layer in program.allocate() for tensor in layer]
    prefill = expand(program.prefill, policy.extend_op, chosen[policy.extend_op])
    decode = expand(program.decode, policy.decode_op, chosen[policy.decode_op])
    return Lowered(
        compile_graph(prefill, prefill_inputs(program, state)),
        compile_graph(decode, decode_inputs(program, state)),
        {"decode": names[policy.decode_op], "extend": names[policy.extend_op]},
    )


def expand(gm: fx.GraphModule, op: Any, kernel: kernels.Kernel | None) -> fx.GraphModule:
    """A copy of the graph (its parameters shared) that calls `kernel`, where there is one, in place of `op`."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    if kernel is not None:
        for node in copied.graph.find_nodes(op="call_function", target=op):
            node.target = kernel.run
        copied.recompile()
    return copied


def decode_inputs(program: Program, state: list[Tensor]) -> list[Tensor]:
    """Example inputs of the decode graph: every shape static."""
    batch, device = program.batch_size, program.device
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    seen = torch.zeros(batch, dtype=torch.int64, device=device)
    return [ids, seen, torch.ones(batch, dtype=torch.bool, device=device), *state]


def prefill_inputs(program: Program, state: list[Tensor]) -> list[Tensor]:
    """Example inputs of the prefill graph: rows and length symbolic, as they were exported; the rest static."""
    ids = program.prefill.graph.find_nodes(op="placeholder")[0].meta["val"]
    mode: FakeTensorMode = ids.fake_mode
    with mode:
        positions, rows = torch.empty_like(ids), torch.empty_like(ids[:, 0])
        pads = torch.empty_like(rows)
    seen = torch.zeros(program.batch_size, dtype=torch.int64, device=program.device)
    static = [mode.from_tensor(tensor, static_shapes=True) for tensor in (seen, *state)]
    return [ids, positions, rows, static[0], pads, *static[1:]]


def compile_graph(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
    """AOTAutograd and Inductor on a traced graph."""
    with torch.no_grad():
        return compile_fx(gm, inputs)
