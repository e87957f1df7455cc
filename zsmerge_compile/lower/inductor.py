"""Inductor: one static decode graph and one dynamic prefill graph, compiled without Dynamo in front.

The graphs are already traced, so AOTAutograd and Inductor take them directly: a call has no guards to check and can
never recompile. A cache op is expanded to its kernel (`kernels`, `expand`), whose writes are done in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from zsmerge_compile.lower import kernels
from zsmerge_compile.lower.expand import annotated, expand
from zsmerge_compile.lower.kernels import Kernel
from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.lower.stages import Stages
from zsmerge_compile.passes.outline_layers import outline_layers
from zsmerge_compile.passes.pipeline import dump
from zsmerge_compile.program import Program

# Layers from which one is compiled for all that are alike. A CUDA graph hides the calls between parts; on a CPU they
# cost some hundredths of a small model's step, so there it is done where the whole graph takes minutes to compile.
DEEP = {"cuda": 4}
DEEP_ELSEWHERE = 16


def lower(program: Program, outline: bool | None = None) -> Lowered:
    """Compile both graphs; returns when the code is ready.

    outline: compile layers that are alike once (`passes/outline_layers.py`); None: by `DEEP`.
    """
    if outline is None:
        outline = len(program.layouts) >= DEEP.get(program.device.type, DEEP_ELSEWHERE)
    prefill, decode = lower_graph(program, "prefill", outline), lower_graph(program, "decode", outline)
    names = {"extend": prefill.kernel, "decode": decode.kernel}
    return Lowered(prefill.run, decode.run, names, {"prefill": prefill.parts, "decode": decode.parts})


class Compiled(NamedTuple):
    """A graph's callable, how many graphs were compiled for it, and which kernel is in them."""

    run: Any
    parts: int
    kernel: str


def lower_graph(program: Program, name: str, outline: bool = False) -> Compiled:
    """Compile the program's "prefill" or "decode" graph."""
    op = program.policy.decode_op if name == "decode" else program.policy.extend_op
    kernel = kernels.choose(op, program)
    gm = annotated(getattr(program, name), decode_inputs(program) if name == "decode" else prefill_inputs(program))
    outlined = outline_layers(gm, op) if outline else None
    if outlined is None:
        return Compiled(_compile_part(gm, op, kernel), 1, kernel.name)
    dump(name, len(program.counts[name]) + 1, "outline_layers", outlined)
    targets = dict.fromkeys(str(call.target) for call in outlined.graph.find_nodes(op="call_module"))
    parts = {target: _compile_part(outlined.get_submodule(target), op, kernel) for target in targets}
    return Compiled(Stages(outlined, parts), len(parts), kernel.name)


def _compile_part(gm: Any, op: Any, kernel: Kernel) -> Any:
    """A graph whose placeholders carry their fakes."""
    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    return compile_graph(expand(gm, op, kernel), inputs)


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
    """AOTAutograd and Inductor on a traced graph; the result is called with its inputs, one by one."""
    with torch.no_grad():
        return compile_fx(gm, inputs)


def _state(program: Program) -> list[Tensor]:
    return [tensor for layer in program.allocate() for tensor in layer]


def _fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    """The mode of the trace, whose symbolic shapes the nodes refer to."""
    return gm.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode


def _static(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    return mode.from_tensor(tensor, static_shapes=True)
