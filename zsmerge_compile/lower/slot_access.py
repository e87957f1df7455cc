"""Reads and writes of slots as gather and scatter along the slot axis, in an exported decode graph.

Before (what Inductor does in place; torch-tensorrt's converter of index_put fails on the axes behind the indexed ones):

    pair = aten.index.Tensor(key, [rows, groups, slot])                   # key [B, G, S, D], slot [B, G, k]
    key_out = aten.index_put.default(key, [rows, groups, slot], new)      # new [B, G, k, D]

After:

    pair = aten.gather.default(key, 2, slot_as_wide_as_key)               # [B, G, k, D]
    key_out = aten.scatter.src(key, 2, slot_as_wide_as_key, new)

Does not fire where rows and groups are not all rows and all groups in order, or where only one axis is indexed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from zsmerge_compile.lower.constants import Constants, is_arange
from zsmerge_compile.passes.graph import call

INDEX, PUT = torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default


def slot_access(program: torch.export.ExportedProgram) -> int:
    """Rewrite the program's graph, which is functional, where it stands; returns the number of reads and writes."""
    gm, constants, count = program.graph_module, Constants(program), 0
    for target in (INDEX, PUT):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if _by_slot(node, constants):
                with gm.graph.inserting_before(node):
                    _replace(gm.graph, node)
                count += 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return count


def several_indices(program: torch.export.ExportedProgram) -> list[str]:
    """Names of the reads and writes that index several axes at once."""
    nodes = program.graph_module.graph.nodes
    return [node.name for node in nodes if node.target in (INDEX, PUT) and sum(i is not None for i in node.args[1]) > 1]


def _by_slot(node: fx.Node, constants: Constants) -> bool:
    indices: Any = node.args[1]
    if len(indices) != 3 or not all(isinstance(index, fx.Node) for index in indices) or len(node.args) > 3:
        return False
    batch, groups, _ = indices[2].meta["val"].shape
    shapes = (batch, 1, 1), (1, groups, 1)
    return all(is_arange(constants.value(index), shape) for index, shape in zip(indices[:2], shapes, strict=True))


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    arguments: Any = node.args
    buffer, (_, _, slot), *new = arguments
    shape = buffer.meta["val"].shape
    if len(shape) == 4:
        slot = call(graph, torch.ops.aten.unsqueeze.default, slot, 3)
        slot = call(graph, torch.ops.aten.expand.default, slot, [-1, -1, -1, shape[3]])
    op = torch.ops.aten.scatter.src if new else torch.ops.aten.gather.default
    node.replace_all_uses_with(call(graph, op, buffer, 2, slot, *new))
    graph.erase_node(node)
