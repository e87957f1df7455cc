"""Cut a graph into layers and keep one body for all layers that are alike, so that a compiler sees each only once.

Before (one flat graph; `cache_op` stands once per layer):

    embed = aten.embedding(...);  cos = ...;  sin = ...
    ... = zsmerge.decode(q, k, v, layer0_key, ...);  ...  add_5 = aten.add(...)      # layer 0
    ... = zsmerge.decode(q, k, v, layer1_key, ...);  ...  add_9 = aten.add(...)      # layer 1, the same ops
    logits = aten.linear(...)

After:

    head = self.head(input_ids, seen, embed_weight, inv_freq);  hidden = head[0];  cos = head[1];  sin = head[2]
    body = self.body_0(hidden, q_weight_0, ..., cos, sin, layer0_key, ..., seen, active);  hidden_1 = body[0]
    body_1 = self.body_0(hidden_1, q_weight_1, ..., cos, sin, layer1_key, ..., seen, active);  hidden_2 = body_1[0]
    logits = self.tail(hidden_2, norm_weight, lm_head_weight)[0]

Layers are cut where the fewest values cross, the last such place before each cache op; only the nodes decide, no
names. Two layers share a body if they are the same ops on the same constants, shapes and pattern of inputs, so a
layer with another window or budget gets its own. Sizes are computed anew in each part, never handed over.
Does not fire (returns None) on graphs with fewer than two cache ops. The given graph is not changed.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from zsmerge_compile.passes.graph import attribute, value

Key = tuple[Any, ...]


class Part(NamedTuple):
    """A run of nodes, what it takes from outside, and what others take from it."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]


def outline_layers(gm: fx.GraphModule, cache_op: Any) -> fx.GraphModule | None:
    """The graph as calls of `head`, `body_0`, ... and `tail`, each a submodule of plain nodes.

    Every placeholder and get_attr must carry its fake tensor in meta["val"], as traced nodes do.
    """
    nodes = [node for node in gm.graph.nodes if node.op == "call_function" and not _is_size(node)]
    anchors = [place for place, node in enumerate(nodes) if node.target is cache_op]
    if len(anchors) < 2:
        return None
    cuts = find_cuts(nodes, anchors)
    spans = [nodes[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(nodes)], strict=True)]
    parts = [_part(span) for span in spans]
    return _assemble(gm, parts)


def find_cuts(nodes: list[fx.Node], anchors: list[int]) -> list[int]:
    """Where each layer begins, and where the last one ends: len(anchors) + 1 places in `nodes`.

    Between two cache ops: the last place that the fewest values cross. The first layer begins as far before its
    cache op as the second does, and the last ends as far after its own as the one before it.
    """
    width = crossing(nodes)
    inner = []
    for before, here in zip(anchors, anchors[1:], strict=False):
        places = range(before + 1, here + 1)
        fewest = min(width[place] for place in places)
        inner.append(max(place for place in places if width[place] == fewest))
    first = max(0, anchors[0] - (anchors[1] - inner[0]))
    last = min(len(nodes), anchors[-1] + (inner[-1] - anchors[-2]))
    return [first, *inner, last]


def crossing(nodes: list[fx.Node]) -> list[int]:
    """For each place in `nodes` (before the node of that number): how many values are made before and used after."""
    place = {node: number for number, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 2)
    for number, node in enumerate(nodes):
        last = max((place.get(user, len(nodes)) for user in _users(node)), default=number)
        change[number + 1] += 1
        change[last + 1] -= 1
    width, total = [], 0
    for step in change[:-1]:
        total += step
        width.append(total)
    return width


def _is_size(node: fx.Node) -> bool:
    """Whether a node yields a size (or arithmetic on sizes), which every part can compute for itself."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt | int)


def _users(node: fx.Node) -> list[fx.Node]:
    """Users of a node; behind a size, the users of that size."""
    found = []
    for user in node.users:
        found += _users(user) if _is_size(user) else [user]
    return found


def _used(node: fx.Node) -> list[fx.Node]:
    """Tensors a node is computed from, in order; those behind a size instead of the size."""
    found = []
    for used in node.all_input_nodes:
        found += _used(used) if _is_size(used) else [used]
    return found


def _part(span: list[fx.Node]) -> Part:
    mine = set(span)
    inputs = dict.fromkeys(used for node in span for used in _used(node) if used not in mine)
    outputs = [node for node in span if any(user not in mine for user in _users(node))]
    return Part(span, list(inputs), outputs)


def _assemble(gm: fx.GraphModule, parts: list[Part]) -> fx.GraphModule:
    graph, outer = fx.Graph(), {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            outer[node] = graph.node_copy(node)
    names, modules = name_parts(parts), {}
    for name, part in zip(names, parts, strict=True):
        if not part.nodes:
            continue
        if name not in modules:
            modules[name] = body(part, name)
        call = graph.call_module(name, tuple(outer[used] for used in part.inputs))
        for place, node in enumerate(part.outputs):
            outer[node] = graph.call_function(operator.getitem, (call, place))
            outer[node].meta["val"] = value(node)
    graph.output(fx.map_arg(gm.graph.output_node().args[0], lambda node: outer[node]))
    root: dict[str, Any] = dict(modules)
    root |= {str(node.target): attribute(gm, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    graph.lint()
    return fx.GraphModule(root, graph, class_name="Outlined")


def name_parts(parts: list[Part]) -> list[str]:
    """`head`, a name for each layer's body (layers that are alike share one), `tail`."""
    bodies: dict[Key, str] = {}
    layers = [bodies.setdefault(structure(part), f"body_{len(bodies)}") for part in parts[1:-1]]
    return ["head", *layers, "tail"]


def structure(part: Part) -> Key:
    """What two parts must have in common to share a body: ops, constants, and the inputs' shapes and identities."""
    number: dict[fx.Node, Key] = {node: ("input", place) for place, node in enumerate(part.inputs)}
    lines = []
    for place, node in enumerate(part.nodes):
        lines.append((node.target, _spell(node.args, number), _spell(node.kwargs, number)))
        number[node] = ("node", place)
    fakes = [value(node) for node in part.inputs]
    facts = [(str(fake.dtype), str(fake.device), str(tuple(fake.shape)), str(fake.stride())) for fake in fakes]
    same = [next(place for place, other in enumerate(fakes) if other is fake) for fake in fakes]  # tied weights
    return tuple(lines), tuple(facts), tuple(same), tuple(number[node] for node in part.outputs)


def _spell(argument: Any, number: dict[fx.Node, Key]) -> Any:
    """An argument without node names: hashable, equal where two parts do the same."""
    if isinstance(argument, fx.Node):
        if argument in number:
            return number[argument]
        return argument.target, _spell(argument.args, number), _spell(argument.kwargs, number)  # a size
    if isinstance(argument, tuple | list):
        return tuple(_spell(item, number) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _spell(item, number)) for name, item in argument.items())
    return type(argument).__name__, repr(argument)  # repr tells 1 from 1.0, 0.0 from -0.0


def body(part: Part, name: str) -> fx.GraphModule:
    """A part as a module of its own: its inputs are placeholders, its outputs a tuple."""
    graph = fx.Graph()
    inner: dict[fx.Node, fx.Node] = {}
    for used in part.inputs:
        inner[used] = graph.placeholder(used.name)
        inner[used].meta["val"] = value(used)

    def find(node: fx.Node) -> fx.Node:
        if node not in inner:
            assert _is_size(node), node.format_node()
            inner[node] = graph.node_copy(node, find)
        return inner[node]

    for node in part.nodes:
        inner[node] = graph.node_copy(node, find)
    graph.output(tuple(inner[node] for node in part.outputs))
    return fx.GraphModule(torch.nn.Module(), graph, class_name=name)
