"""Inductor: one static decode graph and one dynamic prefill graph, compiled without Dynamo in front.

The graphs are already traced, so AOTAutograd and Inductor take them directly: a call has no guards to check and can
never recompile. A cache op with a kernel is expanded to it (`expand`), and its writes are done in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from zsmerge_compile.lower import kernels
from zsmerge_compile.lower.expand import expand
from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.program import Program


def lower(program: Program) -> Lowered:
    """Compile both graphs; returns when the code is ready."""
    prefill, extend_kernel = _compile(program, program.prefill, program.policy.extend_op, prefill_inputs(program))
    decode, decode_kernel = _compile(program, program.decode, program.policy.decode_op, decode_inputs(program))
    return Lowered(prefill, decode, {"decode": decode_kernel, "extend": extend_kernel})


def _compile(program: Program, gm: fx.GraphModule, op: Any, inputs: list[Tensor]) -> tuple[Any, str]:
    kernel = kernels.choose(op, program.device.type)
    if kernel is None:
        return compile_graph(gm, inputs), f"{op} (one opaque call)"
    return compile_graph(expand(gm, op, kernel, inputs), inputs), kernel.name


def decode_inputs(program: Program) -> list[Tensor]:
    """Fake inputs of the decode graph: every shape static."""
    batch, device = program.batch_size, program.device
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    active = torch.ones(batch, dtype=torch.bool, device=device)
    mode = _fake_mode(program.decode)
    return [_static(mode, tensor) for tensor in (ids, ids[:, 0].clone(), active, *_state(program))]


def prefill_inputs(program: Program) -> list[Tensor]:
    """Fake inputs of the prefill graph: rows and length symbolic, as they were exported; the rest static."""
    mode = _fake_mode(program.prefill)
    ids = program.prefill.graph.find_nodes(op="placeholder")[0].meta["val"]
    with mode:
        positions, rows, pads = torch.empty_like(ids), torch.empty_like(ids[:, 0]), torch.empty_like(ids[:, 0])
    seen = torch.zeros(program.batch_size, dtype=torch.int64, device=program.device)
    return [ids, positions, rows, _static(mode, seen), pads, *(_static(mode, tensor) for tensor in _state(program))]


def compile_graph(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
    """AOTAutograd and Inductor on a traced graph."""
    with torch.no_grad():
        return compile_fx(gm, inputs)


def _state(program: Program) -> list[Tensor]:
    return [tensor for layer in program.allocate() for tensor in layer]


def _fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    """The mode of the trace, whose symbolic shapes the nodes refer to."""
    return gm.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode


def _static(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    return mode.from_tensor(tensor, static_shapes=True)
