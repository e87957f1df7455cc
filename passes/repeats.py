"""How often entries along a dimension are provably repeated: read from the graph's structure, never from numbers.

`Repeats.factor(node, dim)` is r when consecutive groups of r entries along `dim` are equal whatever the inputs and
weights are. Equal numbers prove nothing: weights may be zero, or tied by training.
"""

import math
import operator
from typing import Any

import torch
from torch import fx

from zsmerge_compile.passes.graph import arguments, aten_name, permutation, same_size, value
from zsmerge_compile.passes.scores import CASTS

ANY = 0  # the factor along a dimension of size 1: broadcasting may repeat it at will; gcd's neutral element

_POINTWISE = (  # those without torch's own tag
    *CASTS,
    *("where", "rsub", "masked_fill", "floor_divide", "__and__", "__or__", "__xor__"),
    *("multiply", "divide", "subtract", "greater", "greater_equal", "less", "less_equal", "not_equal"),
)
_RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten")
_REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "linalg_vector_norm")
_LAST_DIMS = ("softmax", "_softmax", "linear")  # entries along any other dimension are treated alike
_NORMS = ("layer_norm", "rms_norm")


class Repeats:
    """Repetition factors of one graph's nodes, each found once."""

    def __init__(self) -> None:
        self._known: dict[tuple[fx.Node, int], int] = {}

    def factor(self, node: fx.Node, dim: int) -> int:
        """Largest r known to divide the size at `dim` such that groups of r entries are equal; ANY if the size is 1."""
        key = (node, dim)
        if key not in self._known:
            self._known[key] = self._find(node, dim)
        return self._known[key]

    def _find(self, node: fx.Node, dim: int) -> int:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return 1
        size = value(node).shape[dim]
        if isinstance(size, torch.SymInt):
            return 1
        if size == 1:
            return ANY
        found = self._through(node, dim)
        return int(size) if found == ANY else math.gcd(found, int(size))

    def _through(self, node: fx.Node, dim: int) -> int:
        """The factor by the op that made the node."""
        name = aten_name(node)
        if node.target is operator.getitem:
            return self._of_piece(node, dim)
        if not name:
            return 1
        if name in ("expand", "broadcast_to"):
            return self._of_input(node, dim - value(node).dim() + _rank(node.args[0]))
        if is_pointwise(node):
            return self._pointwise(node, dim)
        if name in _RESHAPES:
            return self._reshaped(node, dim)
        if permutation(node) or name in ("unsqueeze", "squeeze", "select", "slice", "index"):
            source = source_dim(node, dim)
            return 1 if source is None else self._of_input(node, source)
        return self._other(node, name, dim)

    def _of_input(self, node: fx.Node, dim: int) -> int:
        source = node.args[0]
        return ANY if dim < 0 else self.factor(source, dim) if isinstance(source, fx.Node) else 1

    def _pointwise(self, node: fx.Node, dim: int) -> int:
        rank, factors = value(node).dim(), []
        for source in node.all_input_nodes:
            if isinstance(source.meta.get("val"), torch.Tensor):
                at = dim - rank + _rank(source)
                factors.append(ANY if at < 0 else self.factor(source, at))
        return math.gcd(*factors) if factors else 1

    def _reshaped(self, node: fx.Node, dim: int) -> int:
        """Row-major merging of dimensions repeats as the innermost do, as long as those repeat throughout."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        before, after = value(source).shape, value(node).shape
        head, tail = _equal_ends(before, after)
        if dim < head:
            return self.factor(source, dim)
        if dim >= len(after) - tail:
            return self.factor(source, dim - len(after) + len(before))
        merged = self._merged(source, range(head, len(before) - tail))
        inside = after[dim + 1 : len(after) - tail]
        if any(isinstance(size, torch.SymInt) for size in inside):
            return 1
        inner = math.prod(inside)
        return 1 if merged % inner else math.gcd(merged // inner, int(after[dim]))

    def _merged(self, source: fx.Node, dims: range) -> int:
        """Factor along `dims` of source merged into one."""
        total = 1
        for dim in reversed(dims):
            size = value(source).shape[dim]
            if isinstance(size, torch.SymInt):
                break
            own = self.factor(source, dim) or int(size)
            total *= own
            if own != size:
                break
        return total

    def _of_piece(self, node: fx.Node, dim: int) -> int:
        """getitem of a split, chunk or unbind along another dimension."""
        pieces: Any = node.args[0]
        name = aten_name(pieces)
        if name not in ("split", "split_with_sizes", "chunk"):
            return 1
        along = arguments(pieces)["dim"] % value(node).dim()
        return 1 if along == dim else self._of_input(pieces, dim)

    def _other(self, node: fx.Node, name: str, dim: int) -> int:
        rank = value(node).dim()
        if name == "cat":
            pieces, along = node.args[0], arguments(node)["dim"] % rank
            return 1 if along == dim else math.gcd(*(self.factor(piece, dim) for piece in pieces))  # type: ignore
        if name == "repeat_interleave" and isinstance(count := node.args[1], int):
            along = arguments(node).get("dim")
            times = count if along is not None and along % rank == dim else 1
            return times * (self._of_input(node, dim) or 1) if along is not None else 1
        if name == "repeat":
            return self._tiled(node, dim)
        if name in _REDUCTIONS and arguments(node).get("keepdim"):
            return self._of_input(node, dim)  # a reduced dimension has size 1 and was dealt with
        normalised = len(arguments(node)["normalized_shape"]) if name in _NORMS else 1
        if name in (*_LAST_DIMS, *_NORMS) and dim < rank - normalised:
            return self._of_input(node, dim)
        if name == "matmul" and dim < rank - 2:
            return self._pointwise(node, dim)
        return 1

    def _tiled(self, node: fx.Node, dim: int) -> int:
        """repeat(k, 1, r, ...) tiles: equal neighbours only where the size was 1, or the dimension is not repeated."""
        at = dim - value(node).dim() + _rank(node.args[0])
        times = node.args[1][dim]  # type: ignore[index]
        inner = ANY if at < 0 else self._of_input(node, at)
        return inner if times == 1 or inner == ANY else 1


def is_pointwise(node: fx.Node) -> bool:
    """Whether each output entry is made, the same way everywhere, from its inputs' entries at the same place."""
    tags = getattr(node.target, "tags", ())
    pointwise = aten_name(node) in _POINTWISE or torch.Tag.pointwise in tags
    return pointwise and torch.Tag.nondeterministic_seeded not in tags


def source_dim(node: fx.Node, dim: int) -> int | None:
    """The dimension of a view's input that becomes `dim` of the view, whole and in order; None if there is none."""
    name, given, rank = aten_name(node), arguments(node), value(node).dim()
    if (order := permutation(node)) is not None:
        return order[dim]
    if name == "unsqueeze":
        at = given["dim"] % rank
        return None if dim == at else dim - (dim > at)
    if name == "select":
        return dim + (dim >= given["dim"] % (rank + 1))
    if name == "slice":
        return dim if dim != given["dim"] % rank or is_whole(node) else None
    if name == "squeeze" and isinstance(given.get("dim"), int):
        return dim + (dim >= given["dim"] % (rank + 1)) if rank < _rank(node.args[0]) else dim
    if name == "index":
        return _indexed_dim(given["indices"], dim)
    return None


def _indexed_dim(indices: Any, dim: int) -> int | None:
    """x[:, :, i]: one vector of indices replaces one dimension, the others stay where they were."""
    used = [at for at, index in enumerate(indices) if index is not None]
    if len(used) != 1 or value(indices[used[0]]).dim() != 1 or used[0] == dim:
        return None
    return dim


def is_whole(node: fx.Node) -> bool:
    """Whether a slice takes everything."""
    given = arguments(node)
    size = value(node.args[0]).shape[given["dim"]]  # type: ignore[arg-type]
    start, end = given["start"] or 0, given["end"]
    ends = end is None or (isinstance(end, int) and end >= 2**31) or (isinstance(size, int) and end == size)
    return start == 0 and given["step"] == 1 and ends


def _rank(node: Any) -> int:
    return value(node).dim()


def _equal_ends(before: Any, after: Any) -> tuple[int, int]:
    """How many leading and trailing dimensions a reshape leaves as they are."""
    shortest = min(len(before), len(after))
    head = 0
    while head < shortest and same_size(before[head], after[head]):
        head += 1
    tail = 0
    while tail < shortest - head and same_size(before[-1 - tail], after[-1 - tail]):
        tail += 1
    return head, tail
