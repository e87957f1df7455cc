"""Helpers that every pass shares: reading nodes, naming them in errors, adding and removing them."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from zsmerge_compile.models.spec import ModelSpec
from zsmerge_compile.ops.contracts import ATTENTION
from zsmerge_compile.passes.masks import MaskKind

LAYER = "zsmerge_layer"  # key in a canonical attention's meta


@dataclass
class PassContext:
    """What the passes know besides the graph."""

    spec: ModelSpec
    masks: dict[int, MaskKind] = field(default_factory=dict)  # by layer, filled from the prefill graph
    logits_only: bool = True  # the graph's one output is the logits of the last column


def aten_name(node: fx.Node) -> str:
    """`mul` for aten.mul.Tensor and for aten.mul.Scalar; "" for anything that is no aten op."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return target._opname
    return ""


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an operator call by schema name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound = {}
    for position, argument in enumerate(node.target._schema.arguments):
        given = node.args[position] if position < len(node.args) else argument.default_value
        bound[argument.name] = node.kwargs.get(argument.name, given)
    return bound


def value(node: fx.Node) -> Tensor:
    """The fake tensor that tracing left for `node`: its shape, dtype and device."""
    return node.meta["val"]


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are provably equal. Comparing symbolic sizes directly would add a guard."""
    return size_expression(a) == size_expression(b)


def size_expression(size: Any) -> Any:
    """An int, or the sympy expression of a symbolic size."""
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def same_shape(a: fx.Node, b: fx.Node, but: int | None = None) -> bool:
    """Whether two nodes have provably equal shapes, dimension `but` aside."""
    left, right = value(a).shape, value(b).shape
    if len(left) != len(right):
        return False
    return all(dim == but or same_size(one, other) for dim, (one, other) in enumerate(zip(left, right, strict=True)))


def permutation(node: fx.Node) -> list[int] | None:
    """For a node that reorders dimensions: the input's dimension that each of its own shows."""
    name, rank = aten_name(node), value(node).dim() if isinstance(node.meta.get("val"), Tensor) else 0
    order = list(range(rank))
    if name == "permute":
        return [int(dim) % rank for dim in arguments(node)["dims"]]
    if name in ("transpose", "swapaxes", "swapdims"):
        one, other = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
    elif name in ("mT", "t", "numpy_T") and rank >= 2 and (name == "mT" or rank == 2):
        one, other = rank - 2, rank - 1
    else:
        return None
    order[one], order[other] = other, one
    return order


def call(graph: fx.Graph, op: Callable[..., Any], *args: Any, like: fx.Node | None = None) -> fx.Node:
    """Add a call at the graph's insert point, with the fake value it yields; meta is otherwise that of `like`."""
    node = graph.call_function(op, args)
    if like is not None:
        node.meta.update({key: kept for key, kept in like.meta.items() if key != "val"})
    fakes = fx.map_arg(args, lambda argument: argument.meta["val"])
    mode = next((fake.fake_mode for fake in _leaves(fakes) if hasattr(fake, "fake_mode")), None)
    if mode is not None:
        with mode, torch.no_grad():
            node.meta["val"] = op(*fakes)
    return node


def _leaves(structure: Any) -> Iterable[Any]:
    return torch.utils._pytree.tree_leaves(structure)


def erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase those of `nodes` (users before their inputs) that nothing uses any more."""
    for node in nodes:
        if not node.users and node.op == "call_function":
            graph.erase_node(node)


def attention_sites(gm: fx.GraphModule) -> list[tuple[int, fx.Node]]:
    """Canonical attention calls with their layers, in graph order."""
    return [(layer_index(node), node) for node in gm.graph.find_nodes(op="call_function", target=ATTENTION)]


def layer_index(node: fx.Node) -> int:
    """The layer of a canonical attention call, as `number_sites` found it."""
    index: int = node.meta[LAYER]
    return index


def number_sites(gm: fx.GraphModule) -> None:
    """Give every canonical attention call its layer.

    The layer is the number in the path of the module that made the call (`model.layers.3.self_attn`), whatever the
    attributes are called. Where those numbers are not 0 .. n-1, as with nested or shared blocks, graph order counts.
    """
    nodes = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    numbers = [_module_number(node) for node in nodes]
    if sorted(number for number in numbers if number is not None) != list(range(len(nodes))):
        numbers = list(range(len(nodes)))
    for node, number in zip(nodes, numbers, strict=True):
        node.meta[LAYER] = number


def _module_number(node: fx.Node) -> int | None:
    path = module_path(node)
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made the node, "" if the trace does not say."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""


def where(node: fx.Node) -> str:
    """`softmax_3 (model.layers.3.self_attn, "attn = softmax(...)", modeling_x.py:42)` for error messages."""
    parts = [part for part in (module_path(node), source_line(node)) if part]
    return f"{node.name} ({', '.join(parts)})" if parts else node.name


def source_line(node: fx.Node) -> str:
    """`path/file.py:line: code` of the model's source that made the node, "" if the trace does not say."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    at = max((i for i, line in enumerate(lines) if line.startswith("File ")), default=None)
    if at is None:
        return ""
    file, line = (piece.strip() for piece in lines[at].split(",")[:2])
    code = f": {lines[at + 1]}" if at + 1 < len(lines) else ""
    return f"{file.removeprefix('File ').strip(chr(34))}:{line.removeprefix('line ')}{code}"


def constant(gm: fx.GraphModule, node: Any) -> float | None:
    """The number behind an argument: a Python number, or a one-element tensor computed from constants alone."""
    if isinstance(node, bool | int | float):
        return float(node)
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor) or value(node).numel() != 1:
        return None
    try:
        return float(_evaluate_constant(gm, node))
    except _NotConstant:
        return None


class _NotConstant(Exception):
    pass


def _evaluate_constant(gm: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "get_attr":
        return attribute(gm, str(node.target))
    if node.op != "call_function":
        raise _NotConstant
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: _evaluate_constant(gm, argument))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def calling(gm: fx.GraphModule, op: Any, run: Any) -> fx.GraphModule:
    """A copy of the graph, its parameters shared, that calls the function `run` for every `op`."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for node in copied.graph.find_nodes(op="call_function", target=op):
        node.target = run
    copied.recompile()
    return copied


def attribute(gm: fx.GraphModule, path: str) -> Any:
    """The tensor a get_attr node reads."""
    found: Any = gm
    for name in path.split("."):
        found = getattr(found, name)
    return found


def hides(number: float | None) -> bool:
    """Whether a number added to or written over a logit takes that key out of the softmax."""
    return number is not None and (number <= -1e4 or math.isinf(number)) and number < 0
