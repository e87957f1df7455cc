"""Replace a cache op by what its kernel does, as aten nodes.

Before:

    out = zsmerge.decode(q, k, v, layer0_key, ..., seen, active, ...)

After (the kernel of `kernels.choose`, traced; its in-place writes stay in-place):

    matmul = aten.matmul(reshape, mT);  ...  index_put_ = aten.index_put_(layer0_key, [...], where_3)

A kernel is traced once for all layers of one shape. Plain nodes instead of a Python call let Inductor's cache know the
graph in the next process. Does not fire where the graph does not hold the op.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from zsmerge_compile.lower.kernels import Kernel
from zsmerge_compile.passes.graph import attribute


def expand(gm: fx.GraphModule, op: Any, kernel: Kernel) -> fx.GraphModule:
    """`kernel` in place of every `op`, in the graph given, whose nodes all carry their fakes (`annotated`)."""
    bodies: dict[Any, fx.GraphModule] = {}
    for node in gm.graph.find_nodes(op="call_function", target=op):
        tensors = [used.meta["val"] for used in node.all_input_nodes]
        places = tuple(_place(node, argument) for argument in node.args)
        key = (places, tuple((str(t.shape), str(t.stride()), t.dtype) for t in tensors))  # symbolic sizes do not hash
        if key not in bodies:
            bodies[key] = _trace(kernel, places, tensors)
        _inline(gm.graph, node, bodies[key])
    gm.recompile()
    return gm


def annotated(gm: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
    """A copy of the graph (its parameters shared) whose placeholders and attributes carry their fakes, as nodes do."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for node, fake in zip(copied.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["val"] = fake
    mode = next(fake.fake_mode for fake in inputs if hasattr(fake, "fake_mode"))
    for node in copied.graph.find_nodes(op="get_attr"):
        node.meta["val"] = mode.from_tensor(attribute(copied, str(node.target)), static_shapes=True)
    return copied


def _place(node: fx.Node, argument: Any) -> tuple[str, Any]:
    """An argument as the number of a tensor among the node's inputs, or as itself."""
    if isinstance(argument, fx.Node):
        return "tensor", node.all_input_nodes.index(argument)
    return "constant", argument


def _trace(kernel: Kernel, places: tuple[tuple[str, Any], ...], tensors: list[Tensor]) -> fx.GraphModule:
    def body(*given: Tensor) -> Tensor:
        return kernel.run(*(given[what] if kind == "tensor" else what for kind, what in places))

    with tensors[0].fake_mode, torch.no_grad():  # type: ignore[attr-defined]
        return make_fx(body)(*tensors)


def _inline(graph: fx.Graph, node: fx.Node, body: fx.GraphModule) -> None:
    """Put the body's nodes in the place of `node`."""
    outer: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "call_function":
                outer[inner] = graph.node_copy(inner, lambda used: outer[used])
            elif inner.op == "get_attr":
                raise NotImplementedError(f"kernel constant {inner.target}")
            elif inner.op == "output":
                node.replace_all_uses_with(outer[inner.args[0]])
    graph.erase_node(node)
