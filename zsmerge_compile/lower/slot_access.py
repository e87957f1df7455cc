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
from torch import Tensor, fx

INDEX, PUT = torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default


def slot_access(program: torch.export.ExportedProgram) -> int:
    """Rewrite the program's graph, which is functional, where it stands; returns the number of reads and writes."""
    gm, known, count = program.graph_module, dict[fx.Node, Any](), 0
    for target in (INDEX, PUT):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if not _by_slot(node, known):
                continue
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


def _by_slot(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    indices = node.args[1]
    assert isinstance(indices, list | tuple)
    if len(indices) != 3 or not all(isinstance(index, fx.Node) for index in indices) or len(node.args) > 3:
        return False
    batch, groups, _ = indices[2].meta["val"].shape  # type: ignore[union-attr]
    expected = torch.arange(batch)[:, None, None], torch.arange(groups)[None, :, None]
    found = (_constant(index, known) for index in indices[:2])  # type: ignore[arg-type]
    return all(x is not None and torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    arguments: Any = node.args
    buffer, (_, _, slot), *new = arguments
    shape = buffer.meta["val"].shape
    wide = slot
    if len(shape) == 4:
        alone = _call(graph, torch.ops.aten.unsqueeze.default, slot, 3)
        wide = _call(graph, torch.ops.aten.expand.default, alone, [-1, -1, -1, shape[3]])
    op = torch.ops.aten.scatter.src if new else torch.ops.aten.gather.default
    result = graph.call_function(op, (buffer, 2, wide, *new))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _call(graph: fx.Graph, op: Any, argument: Any, *rest: Any) -> fx.Node:
    node = graph.call_function(op, (argument, *rest))
    node.meta["val"] = op(argument.meta["val"], *rest)
    return node


def _constant(node: fx.Node, known: dict[fx.Node, Any]) -> Tensor | None:
    """The value of a node that rests on no input, None for others."""
    if node not in known:
        inputs = [_constant(used, known) for used in node.all_input_nodes]
        known[node] = None
        if node.op == "call_function" and all(value is not None for value in inputs):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda used: known[used])
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    value: Tensor | None = known[node]
    return value
