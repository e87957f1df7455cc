"""Single nodes in the form that torch-tensorrt 2.13 converts to what they mean; its registry takes the others too.

Before:                                                   what becomes of it there

    aten.where.self(take, bf16, bf16)                     both cast to int32: a cache of whole numbers
    aten.amax.default(int32, [2], True)                   float32, which no int32 tensor takes in
    aten.select.int(x, 1, -1)                             a negative index to TensorRT, which documents none
    aten.index.Tensor(x, [None, None, constant -2])       the same

After:

    aten._to_copy(aten.where.self(take, fp32, fp32), dtype=bf16)
    aten._to_copy(aten.amax.default(fp32, [2], True), dtype=int32)        # exact up to 2**24
    aten.select.int(x, 1, size - 1)
    aten.slice.Tensor(x, 2, size - 2, size - 1)

Of equal values TensorRT's choice is not documented: a token may take another of several empty slots than elsewhere.
Positions are compared in float32 there too (argmin): exact for the first 2**24 tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from zsmerge_compile.lower.constants import Constants
from zsmerge_compile.passes.graph import call

aten = torch.ops.aten


def tensorrt_spelling(program: torch.export.ExportedProgram) -> int:
    """Rewrite the program's graph, which is functional, where it stands; returns the number of rewrites."""
    gm, constants, count = program.graph_module, Constants(program), 0
    rewrites: dict[Any, Callable[[fx.Graph, fx.Node, Constants], fx.Node | None]] = {
        aten.where.self: _where,
        aten.amax.default: _extreme,
        aten.amin.default: _extreme,
        aten.select.int: _select,
        aten.index.Tensor: _index,
    }
    for target, rewrite in rewrites.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            with gm.graph.inserting_before(node):
                new = rewrite(gm.graph, node, constants)
            if new is not None:
                node.replace_all_uses_with(new)
                gm.graph.erase_node(node)
                count += 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return count


def _where(graph: fx.Graph, node: fx.Node, _: Constants) -> fx.Node | None:
    condition, one, other = node.args
    if node.meta["val"].dtype != torch.bfloat16:
        return None
    chosen = call(graph, aten.where.self, condition, _cast(graph, one), _cast(graph, other))
    return _cast(graph, chosen, torch.bfloat16)


def _extreme(graph: fx.Graph, node: fx.Node, _: Constants) -> fx.Node | None:
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        return None
    target: Any = node.target
    return _cast(graph, call(graph, target, _cast(graph, node.args[0]), *node.args[1:]), dtype)


def _select(graph: fx.Graph, node: fx.Node, _: Constants) -> fx.Node | None:
    arguments: Any = node.args
    x, axis, index = arguments
    return call(graph, aten.select.int, x, axis, index + _val(x).shape[axis]) if index < 0 else None


def _index(graph: fx.Graph, node: fx.Node, constants: Constants) -> fx.Node | None:
    arguments: Any = node.args
    x, indices = arguments
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    value = constants.value(indices[axes[0]]) if len(axes) == 1 else None
    if value is None or tuple(value.shape) != (1,):
        return None
    start = int(value) % _val(x).shape[axes[0]]
    return call(graph, aten.slice.Tensor, x, axes[0], start, start + 1)


def _cast(graph: fx.Graph, x: Any, dtype: torch.dtype = torch.float32) -> fx.Node:
    node = graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
    node.meta["val"] = _val(x).to(dtype)
    return node


def _val(x: fx.Node) -> Tensor:
    return x.meta["val"]
