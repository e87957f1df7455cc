"""A program's two graphs as exporters and TensorRT take them: standard operators only, weights as inputs.

Before:

    def forward(input_ids, seen, active, layer0_key, ...):
        w = self.model.layers.0.self_attn.q_proj.weight
        out = zsmerge.decode(q, k, v, layer0_key, ..., seen, active, ...)

After:

    def forward(input_ids, seen, active, layer0_key, ..., model_layers_0_self_attn_q_proj_weight):
        out = decode_step(q, k, v, layer0_key, ..., seen, active, ...)      # traced through by torch.export

A tensor that both graphs read, or one graph under two names, is one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from zsmerge_compile.lower.kernels import standard
from zsmerge_compile.passes.graph import attribute, calling
from zsmerge_compile.passes.insert_cache import DECODE_INPUTS, PREFILL_INPUTS
from zsmerge_compile.program import Program

LENGTH = 150  # tokens of the example prompt: more than two of the scan's blocks, and no multiple of one


class Graph(NamedTuple):
    """One graph.

    module      called with the graph's inputs, the state and the weights, all positional
    inputs      names of what comes before the state
    state       names of the state's tensors
    weights     names of the weights it takes, in order
    example     inputs and state to trace it with
    dynamic     their dynamic dimensions, as torch.export takes them
    """

    module: nn.Module
    inputs: tuple[str, ...]
    state: tuple[str, ...]
    weights: tuple[str, ...]
    example: tuple[Tensor, ...]
    dynamic: tuple[Any, ...]


class Graphs(NamedTuple):
    """Both graphs and the weights they share, by name."""

    prefill: Graph
    decode: Graph
    weights: dict[str, Tensor]


def graphs(program: Program) -> Graphs:
    """The program's graphs; its own are left as they are."""
    weights = _Weights()
    prefill, prefill_weights = _standard(program.prefill, program.policy.extend_op, weights)
    decode, decode_weights = _standard(program.decode, program.policy.decode_op, weights)
    interface = program.interface()
    state = [tensor for layer in interface.allocate() for tensor in layer.values()]
    batch, device = program.batch_size, program.device
    seen = torch.zeros(batch, dtype=torch.int64, device=device)
    none = (None,) * len(state)

    ids = torch.zeros(2, LENGTH, dtype=torch.int64, device=device)
    row, column = torch.export.Dim("rows", min=1), torch.export.Dim("columns", min=1)
    prompt = (ids, ids.clone(), ids[:, 0].clone(), seen, ids[:, 0].clone(), *state)
    moves = ({0: row, 1: column}, {0: row, 1: column}, {0: row}, None, {0: row}, *none)
    token = (ids.new_zeros(batch, 1), seen.clone(), torch.ones_like(seen, dtype=torch.bool), *state)
    return Graphs(
        Graph(prefill, PREFILL_INPUTS, interface.state_names, prefill_weights, prompt, moves),
        Graph(decode, DECODE_INPUTS, interface.state_names, decode_weights, token, (None,) * len(token)),
        weights.tensors,
    )


def exported(graph: Graph, weights: dict[str, Tensor], holder: nn.Module | None = None) -> torch.export.ExportedProgram:
    """torch.export's program of the graph; the state's writes are among its signature.

    Its weights are its last inputs, or the buffers of `holder`, which is called with the inputs and the state.
    """
    mine = [weights[name] for name in graph.weights] if holder is None else []
    with torch.no_grad():
        return torch.export.export(
            holder or graph.module,
            (*graph.example, *mine),
            dynamic_shapes=((*graph.dynamic, *(None for _ in mine)),),  # forward takes *inputs
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


class _Called(nn.Module):
    """A graph as a module without parameters of its own."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self._run = [run]  # in a list, so that a GraphModule is no submodule

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._run[0](*inputs)


class _Weights:
    """Tensors by name, each once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def name_of(self, tensor: Tensor, wish: str) -> str:
        """The tensor's name: `wish`, or `wish_2` where another has it, unless it has one already."""
        if id(tensor) not in self._names:
            free = next(name for name in _numbered(wish) if name not in self.tensors)
            self._names[id(tensor)], self.tensors[free] = free, tensor.detach()
        return self._names[id(tensor)]


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in count(2):
        yield f"{name}_{number}"


def _standard(gm: fx.GraphModule, op: Any, weights: _Weights) -> tuple[nn.Module, tuple[str, ...]]:
    """The graph with standard operators for every `op` and its weights as last inputs; their names."""
    copied = calling(gm, op, standard(op))
    taken: dict[str, fx.Node] = {}
    last = copied.graph.find_nodes(op="placeholder")[-1]
    for node in copied.graph.find_nodes(op="get_attr"):
        name = weights.name_of(attribute(copied, str(node.target)), str(node.target))
        if name not in taken:
            with copied.graph.inserting_after(last):
                last = taken[name] = copied.graph.placeholder(name.replace(".", "_"))
        node.replace_all_uses_with(taken[name])
        copied.graph.erase_node(node)
    copied.recompile()
    return _Called(copied), tuple(taken)
