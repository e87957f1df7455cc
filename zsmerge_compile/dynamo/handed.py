"""Dynamo's graph, exported anew behind the three inputs that the passes know.

Before (torch functions; weights are inputs, sizes too where they vary):

    def forward(s16, L_kwargs_input_ids_, L_self_..._weight_, L_kwargs_position_ids_, L_kwargs_attention_mask_, ...):
        inputs_embeds = torch.nn.functional.embedding(L_kwargs_input_ids_, ...)
        return (logits,)

After (ATen; weights are attributes, and the very tensors of the model):

    def forward(input_ids, attention_mask, position_ids):
        embedding = torch.ops.aten.embedding.default(L_self_..._weight_, input_ids)
        return linear

Raises UnsupportedGraphError for a graph with other inputs: keys and values, text that is already embedded, numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from zsmerge_compile.capture import INPUTS, example, trace
from zsmerge_compile.errors import UnsupportedGraphError, must
from zsmerge_compile.ops.contracts import ATTENTION
from zsmerge_compile.passes.graph import PassContext, aten_name, attention_sites, same_size, value
from zsmerge_compile.passes.normalize_attention import normalize_attention
from zsmerge_compile.program import Program

WHOLE = "compile the whole model, from token ids on, without output_attentions"
LENGTH = 11  # columns of the example where the length varies
NO_CACHE = "pass use_cache=False and no past_key_values: the cache is the one in options"
POSITIONS = "pass position_ids [B, T], counted from 0 in each row (for a token cache.seen_tokens[:, None])"
# Ops through which a key stays the same key, however it is laid out or repeated.
_LAYOUT = {"view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "clone", "contiguous", "transpose"}
_LAYOUT |= {"permute", "slice", "alias", "to", "_to_copy", "repeat_interleave"}


class Handed(NamedTuple):
    """Dynamo's graph as the passes take it.

    module   (input_ids, attention_mask, position_ids), each [B, T] -> the outputs; those without a place are unused
    places   role -> number among Dynamo's arguments
    weights  number among Dynamo's arguments -> the tensor, which `module` holds
    floats   number among Dynamo's arguments -> a float of a module (an epsilon, a scale), which `module` holds
    length   columns T, None where they vary
    single   whether the outputs are one bare tensor
    """

    module: fx.GraphModule
    places: dict[str, int]
    weights: dict[int, Tensor]
    floats: dict[int, float]
    length: int | None
    single: bool


def hand_over(gm: fx.GraphModule, inputs: Sequence[Any], program: Program) -> Handed:
    """The graph exported anew, for a cache of `program`. Raises UnsupportedGraphError."""
    nodes = gm.graph.find_nodes(op="placeholder")
    weights = {number: given for number, given in enumerate(inputs) if _is_weight(nodes[number], given)}
    _check_weights(weights.values(), program)
    columns = {number: nodes[number] for number, given in enumerate(inputs) if _is_column(given)}
    sizes = {number: nodes[number] for number, given in enumerate(inputs) if isinstance(given, int | torch.SymInt)}
    floats = {number: float(given) for number, given in enumerate(inputs) if _is_float(given)}
    for number, node in enumerate(nodes):
        if not any(number in known for known in (weights, columns, sizes, floats)):
            _refuse_input(node, inputs[number])
    _check_shapes(columns, inputs, program)
    length = _fixed_length(columns, program.batch_size)
    behind = _Behind(gm, weights, floats, _axes(sizes, columns), list(columns))
    given = example(program.batch_size, length or LENGTH, program.device)[: len(columns)]
    module = trace(
        behind, "Dynamo's graph", given, () if length is not None else ("length",), program.spec.max_positions
    )
    probe = _canonical(module, program)
    roles = _roles(probe, [_source(node) for node in columns.values()], program)
    places = dict(zip(roles, columns, strict=True))
    _check_columns(probe)
    _check_outputs(probe, program)
    single = isinstance(module.graph.output_node().args[0], fx.Node)
    return Handed(_named(module, roles), places, weights, floats, length, single)


class _Behind(nn.Module):
    """Dynamo's graph with its weights and floats in it, its sizes taken from the columns [B, T] it is called with."""

    def __init__(
        self,
        gm: fx.GraphModule,
        weights: dict[int, Tensor],
        floats: dict[int, float],
        axes: dict[int, int],
        columns: list[int],
    ) -> None:
        super().__init__()
        self._run = [gm]  # in a list, so that it is no submodule
        self._floats, self._axes, self._columns = floats, axes, columns
        self._weights = {number: f"weight_{number}" for number in weights}
        for number, tensor in weights.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(self._weights[number], tensor)
            else:
                self.register_buffer(self._weights[number], tensor)

    def forward(self, first: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> Any:
        columns = [column for column in (first, second, third) if column is not None]
        arguments: dict[int, Any] = {number: columns[0].shape[axis] for number, axis in self._axes.items()}
        arguments |= {number: getattr(self, name) for number, name in self._weights.items()}
        arguments |= self._floats | dict(zip(self._columns, columns, strict=True))
        with fx.traceback.preserve_node_meta():  # so that errors name the model's source lines
            return _Interpreter(self._run[0]).run(*(arguments[number] for number in sorted(arguments)))


class _Interpreter(fx.Interpreter):
    """Runs a graph whose floats Dynamo passes as tensors and reads by `item`."""

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "item" and isinstance(args[0], float):
            return args[0]
        return super().call_method(target, args, kwargs)


def _is_weight(node: fx.Node, given: Any) -> bool:
    """Whether Dynamo took the tensor from a module."""
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is not None
    return isinstance(given, nn.Parameter) or (isinstance(given, Tensor) and static)


def _is_float(given: Any) -> bool:
    """Whether Dynamo made a tensor of a Python float (with dynamic=True)."""
    return (
        isinstance(given, Tensor) and given.dim() == 0 and given.dtype == torch.float64 and given.device.type == "cpu"
    )


def _is_column(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dim() == 2 and given.dtype in (torch.int64, torch.int32, torch.bool)


def _source(node: fx.Node) -> str:
    """Where Dynamo found an input, as it writes it: L['kwargs']['input_ids']."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", node.name)
    return str(name() if callable(name) else name)


def _check_weights(weights: Iterable[Tensor], program: Program) -> None:
    """Raise UnsupportedGraphError for another model than the cache's: what it has read means nothing to another."""
    known = {id(tensor) for tensor in (*program.prefill.parameters(), *program.decode.parameters())}
    if not any(id(tensor) in known for tensor in weights):
        got = "none of them (another model, a copy, or a part without weights)"
        hint = f"make a cache for this model; {WHOLE}"
        raise UnsupportedGraphError(must("weights of the graph", "those of the cache's model", got, hint))


def _refuse_input(node: fx.Node, given: Any) -> None:
    what = f"input {_source(node)} of the graph"
    if isinstance(given, Tensor) and given.is_floating_point() and given.dim() == 4:
        raise UnsupportedGraphError(must(what, "token ids, a mask or positions", "keys, values or a 4D mask", NO_CACHE))
    got = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
    expected = "token ids, a mask or positions, each [B, T] of whole numbers, or a weight"
    whole = isinstance(given, Tensor) and not given.is_floating_point()
    hint = "pass it as an argument [B, T]" if whole else WHOLE
    if isinstance(given, Tensor) and given.is_floating_point() and given.dim() == 2:
        hint = "a mask as mask.long()"
    raise UnsupportedGraphError(must(what, expected, got, hint))


def _check_shapes(columns: dict[int, fx.Node], inputs: Sequence[Any], program: Program) -> None:
    """Raise UnsupportedGraphError unless all columns are as many [B, T], and B is the cache's."""
    if not columns:
        raise UnsupportedGraphError(must("inputs of the graph", "token ids", "no whole numbers [B, T]", WHOLE))
    if len(columns) > len(INPUTS):
        got = ", ".join(map(_source, columns.values()))
        raise UnsupportedGraphError(must("inputs [B, T] of the graph", f"of {', '.join(INPUTS)}", got))
    first = list(inputs[next(iter(columns))].shape)
    for number, node in columns.items():
        shape, hint = list(inputs[number].shape), "give the columns of this call, for every row"
        if shape != first:
            what = f"input {_source(node)} of the graph"
            raise UnsupportedGraphError(must(what, f"of shape {first} like the others", shape, hint))
    if first[0] != program.batch_size:
        hint = "make a cache for as many: zs.new_cache(model, config, batch_size)"
        raise UnsupportedGraphError(must("rows of the graph", f"{program.batch_size}, as in the cache", first[0], hint))


def _fixed_length(columns: dict[int, fx.Node], batch_size: int) -> int | None:
    """Columns per row where Dynamo fixed them, None where they vary.

    Where it took rows and columns for one size, as the first prompt had as many, they are as many as the rows.
    """
    shapes = [node.meta["example_value"].shape for node in columns.values()]
    lengths = [batch_size if str(rows) == str(length) else length for rows, length in shapes]
    return next((length for length in lengths if isinstance(length, int)), None)


def _axes(sizes: dict[int, fx.Node], columns: dict[int, fx.Node]) -> dict[int, int]:
    """For every size among the inputs: which dimension of [B, T] it is. Raises UnsupportedGraphError."""
    shapes = [node.meta["example_value"].shape for node in columns.values()]
    known = {str(size): axis for shape in shapes for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)}
    found = {}
    for number, node in sizes.items():
        name = str(node.meta.get("example_value"))
        if node.users and name not in known:
            what, expected = f"input {_source(node)} of the graph", "token ids, a mask, positions or a weight"
            raise UnsupportedGraphError(must(what, expected, "a number", "pass the same number in every call"))
        found[number] = known.get(name, 0)  # where nothing uses it (a stride, say), any will do
    return found


def _roles(probe: fx.GraphModule, sources: list[str], program: Program) -> list[str]:
    """What each placeholder is: by the caller's name for it, else by its use. Raises UnsupportedGraphError."""
    sites = [site for _, site in attention_sites(probe)]
    uses = {
        "input_ids": _above(node.args[1] for node in probe.graph.nodes if _is_tokens(node, program)),
        "position_ids": _above(node for site in sites for node in site.args[:3]),
        "attention_mask": _above(site.args[3] for site in sites),
    }
    roles = []
    for node, source in zip(probe.graph.find_nodes(op="placeholder"), sources, strict=True):
        role = next((name for name in INPUTS if f"'{name}'" in source), None)
        if role is None:
            role = next((name for name, users in uses.items() if node in users), None)
        if role is None or role in roles:
            got = "one that attention does not use" if role is None else f"a second {role}"
            expected = f"one of {', '.join(INPUTS)}"
            raise UnsupportedGraphError(
                must(f"input {source} of the graph", expected, got, "name it as the model does")
            )
        roles.append(role)
    if "input_ids" not in roles:
        raise UnsupportedGraphError(must("inputs of the graph", "with token ids", ", ".join(sources)))
    if "position_ids" not in roles:
        got = "positions that the model counts itself, from 0 in every call"
        raise UnsupportedGraphError(must("position_ids", "an input of the graph", got, POSITIONS))
    return roles


def _check_columns(probe: fx.GraphModule) -> None:
    """Raise UnsupportedGraphError unless every attention is over the rows and columns of the graph's inputs."""
    batch, length = value(probe.graph.find_nodes(op="placeholder")[0]).shape
    for layer, site in attention_sites(probe):
        query = value(site.args[0]).shape  # type: ignore[arg-type]
        if not (same_size(query[0], batch) and same_size(query[2], length)):
            what, expected = f"tokens that attend in layer {layer}", f"the inputs' [{batch}, {length}]"
            hint = "cut, join and repeat them before the call that is compiled"
            raise UnsupportedGraphError(must(what, expected, f"[{query[0]}, {query[2]}]", hint))


def _check_outputs(probe: fx.GraphModule, program: Program) -> None:
    """Raise UnsupportedGraphError if keys or values of a layer leave the graph, or are not of the cache's dtype."""
    left = {node.name for node in probe.graph.output_node().all_input_nodes}
    for layer, site in attention_sites(probe):
        for what, node in zip(("key", "value"), site.args[1:3], strict=True):
            if value(node).dtype != program.dtype:  # type: ignore[arg-type]
                got = f"{value(node).dtype}"  # type: ignore[arg-type]
                raise UnsupportedGraphError(
                    must(
                        f"{what} of layer {layer}",
                        f"{program.dtype} as the cache",
                        got,
                        "call it without autocast; for a changed model make a new cache",
                    )
                )
            if any(same.name in left for same in _same(node)):
                raise UnsupportedGraphError(
                    must("outputs of the graph", "without keys and values", f"a {what} of layer {layer}", NO_CACHE)
                )


def _canonical(module: fx.GraphModule, program: Program) -> fx.GraphModule:
    """A copy with canonical attention. Raises UnsupportedGraphError unless all of the model's is in it."""
    probe = fx.GraphModule(module, copy.deepcopy(module.graph))
    found = normalize_attention(probe, PassContext(program.spec, logits_only=False))
    if found != program.spec.num_layers:
        expected = f"{program.spec.num_layers}, one per layer of the model that the cache is for"
        raise UnsupportedGraphError(must("attentions found in the graph", expected, found, WHOLE))
    return probe


def _above(nodes: Iterable[Any]) -> set[fx.Node]:
    """All that the nodes are computed from, without what reaches them through attention."""
    found: set[fx.Node] = set()
    left = [node for node in nodes if isinstance(node, fx.Node)]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [] if node.target is ATTENTION else node.all_input_nodes
    return found


def _same(node: Any) -> Iterable[fx.Node]:
    """The node and what it is a layout of, up to the node that made its values, or put them behind earlier ones."""
    while isinstance(node, fx.Node):
        yield node
        node = node.args[0] if aten_name(node) in _LAYOUT else None


def _is_tokens(node: fx.Node, program: Program) -> bool:
    """Whether a node looks tokens up in a table of the vocabulary."""
    return aten_name(node) == "embedding" and value(node.args[0]).shape[0] == program.spec.vocab_size  # type: ignore[arg-type]


def _named(module: fx.GraphModule, roles: list[str]) -> fx.GraphModule:
    """The placeholders named by their roles, in the order of INPUTS, missing ones added."""
    graph = module.graph
    nodes = dict(zip(roles, graph.find_nodes(op="placeholder"), strict=True))
    first = next(iter(graph.nodes))
    renamed = {}
    for role in INPUTS:
        with graph.inserting_before(first):
            renamed[role] = graph.placeholder(role)
        renamed[role].meta.update(nodes.get(role, nodes["input_ids"]).meta)
    for role, node in nodes.items():
        node.replace_all_uses_with(renamed[role])
        graph.erase_node(node)
    module.recompile()
    return module
