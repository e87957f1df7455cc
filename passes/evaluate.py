"""Evaluate a part of a graph on concrete inputs, for chosen query rows only.

A mask is [B, heads, T, T], which at T = 32,768 is a billion entries, while a few rows of it say everything. `Rows`
therefore asks for rows at the mask and carries that request upwards through pointwise ops, broadcasts and views to
where the row dimension begins, usually a vector of positions.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from zsmerge_compile.passes.graph import arguments, aten_name, attribute, permutation, size_expression, value
from zsmerge_compile.passes.repeats import is_pointwise, source_dim

_FILLED = {"masked_fill": "value", "where": "other", "full": "fill_value", "scalar_tensor": "s"}
_COMPARE = ("lt", "le", "gt", "ge", "eq", "ne", "add", "sub", "floor_divide", "remainder")
_SHAPE_ONLY = ("sym_size", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full")
_UNBOUNDED = 2**31  # an integer constant from here on means "no end"


class Rows:
    """Values of a graph's nodes for given placeholders; `rows` [R] are the indices kept of the row dimension."""

    def __init__(self, gm: fx.GraphModule, inputs: Mapping[str, Tensor], rows: Tensor) -> None:
        self._gm, self._inputs, self._rows = gm, inputs, rows
        self._full: dict[fx.Node, Any] = {}
        self._some: dict[tuple[fx.Node, int], Tensor] = {}
        self._sizes = {
            size_expression(size): actual
            for node in gm.graph.find_nodes(op="placeholder")
            for size, actual in zip(value(node).shape, inputs[str(node.target)].shape, strict=True)
            if isinstance(size, torch.SymInt)
        }

    def of(self, node: fx.Node, dim: int) -> Tensor:
        """The node's value with only `rows` of dimension `dim` (counted from 0); all of it if its size there is 1."""
        if _is_one(node, dim):
            return self.full(node)
        key = (node, dim)
        if key not in self._some:
            self._some[key] = self._of(node, dim)
        return self._some[key]

    def full(self, node: fx.Node) -> Any:
        """The node's whole value."""
        if node not in self._full:
            self._full[node] = self._evaluate(node)
        return self._full[node]

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._inputs[str(node.target)]
        if node.op == "get_attr":
            return attribute(self._gm, str(node.target))
        if aten_name(node) in _SHAPE_ONLY:
            source: fx.Node = node.args[0]  # type: ignore[assignment]
            return self._call(node, self._stand_in(source, None), node.args[1:])
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.full)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _call(self, node: fx.Node, first: Any, rest: Any) -> Any:
        """The node's operator on a given first argument, the others evaluated in full."""
        others, kwargs = fx.map_arg((rest, node.kwargs), self.full)
        return node.target(first, *others, **kwargs)  # type: ignore[operator]

    def _stand_in(self, node: fx.Node, dim: int | None) -> Tensor:
        """A tensor of node's shape (as many as `rows` in `dim`) and dtype, whose values are of no account."""
        expressions = [size_expression(size) for size in value(node).shape]
        sizes = [size if isinstance(size, int) else int(size.subs(self._sizes)) for size in expressions]
        if dim is not None:
            sizes[dim] = len(self._rows)
        return torch.zeros((), dtype=value(node).dtype, device=value(node).device).expand(sizes)

    def _of(self, node: fx.Node, dim: int) -> Tensor:
        name = aten_name(node)
        if name and is_pointwise(node):
            return self._pointwise(node, dim)
        if name in ("expand", "broadcast_to"):
            return self._expanded(node, dim)
        if permutation(node) or name in ("unsqueeze", "slice", "squeeze"):
            source = source_dim(node, dim)
            if source is not None and isinstance(node.args[0], fx.Node):
                return self._call(node, self.of(node.args[0], source), node.args[1:])
        if name in ("zeros_like", "ones_like", "full_like"):
            return self._call(node, self._stand_in(node, dim), node.args[1:])
        if name in ("triu", "tril") and dim == value(node).dim() - 2:
            return self._triangle(node, dim)
        if name == "index" and all(index is not None for index in node.args[1]):  # type: ignore[union-attr]
            return self._gathered(node, dim)
        return self.full(node).index_select(dim, self._rows)

    def _pointwise(self, node: fx.Node, dim: int) -> Tensor:
        rank = value(node).dim()

        def operand(source: fx.Node) -> Any:
            if not isinstance(source.meta.get("val"), Tensor):
                return self.full(source)
            at = dim - rank + value(source).dim()
            return self.full(source) if at < 0 else self.of(source, at)

        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _expanded(self, node: fx.Node, dim: int) -> Tensor:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        at = dim - value(node).dim() + value(source).dim()
        sizes = list(fx.map_arg(node.args[1], self.full))  # type: ignore[arg-type]
        sizes[dim] = len(self._rows)
        return (self.full(source) if at < 0 else self.of(source, at)).expand(sizes)

    def _triangle(self, node: fx.Node, dim: int) -> Tensor:
        rows = self.of(node.args[0], dim)  # type: ignore[arg-type]
        offset = torch.arange(rows.shape[-1], device=rows.device) - self._rows[:, None] - arguments(node)["diagonal"]
        return rows.masked_fill(offset < 0 if aten_name(node) == "triu" else offset > 0, 0)

    def _gathered(self, node: fx.Node, dim: int) -> Tensor:
        """x[i, j, ...] with an index for each leading dimension: the indices are broadcast like operands."""
        indices: Any = node.args[1]
        rank = max(value(index).dim() for index in indices)
        if dim >= rank:
            return self.full(node).index_select(dim, self._rows)
        offsets = [dim - rank + value(index).dim() for index in indices]
        picked = [self.full(i) if at < 0 else self.of(i, at) for i, at in zip(indices, offsets, strict=True)]
        return self.full(node.args[0])[tuple(picked)]  # type: ignore[arg-type]


def _is_one(node: fx.Node, dim: int) -> bool:
    size = value(node).shape[dim]
    return isinstance(size, int) and size == 1


def needed(node: fx.Node) -> list[fx.Node]:
    """The node and everything whose value it is computed from; a tensor of which only the shape matters is left out."""
    found, open_nodes = {node: None}, [node]
    while open_nodes:
        for used in _read_inputs(open_nodes.pop()):
            if used not in found:
                found[used] = None
                open_nodes.append(used)
    return list(found)


def _read_inputs(node: fx.Node) -> list[fx.Node]:
    if aten_name(node) in _SHAPE_ONLY:
        return [used for used in node.all_input_nodes if used is not node.args[0]]
    return node.all_input_nodes


def largest_constant(gm: fx.GraphModule, nodes: list[fx.Node]) -> tuple[int, fx.Node | None]:
    """The largest number in these nodes that may bound a distance between tokens, with the node that holds it.

    Counted are integer arguments, whole numbers compared or added, and small integer tensors; not counted are the
    values that a mask is filled with, and integers that mean "to the end".
    """
    largest: tuple[int, fx.Node | None] = (0, None)
    for node in nodes:
        for number in _constants(gm, node):
            if largest[0] < abs(number) < _UNBOUNDED:
                largest = (int(abs(number)), node)
    return largest


def _constants(gm: fx.GraphModule, node: fx.Node) -> list[float]:
    if node.op == "get_attr":
        tensor = attribute(gm, str(node.target))
        small = isinstance(tensor, Tensor) and not tensor.is_floating_point() and 0 < tensor.numel() <= 64
        return [float(tensor.abs().max())] if small and tensor.dtype != torch.bool else []
    if node.op != "call_function":
        return []
    name = aten_name(node)
    given: Any = arguments(node) if name else dict(enumerate(node.args))
    given.pop(_FILLED.get(name), None)
    numbers = [leaf for leaf in torch.utils._pytree.tree_leaves(list(given.values())) if isinstance(leaf, int | float)]
    compared = name in _COMPARE or node.target in (operator.add, operator.sub)
    return [float(n) for n in numbers if not isinstance(n, bool) and (compared or isinstance(n, int))]
