"""Replace each canonical attention by the policy's cache op, its state an explicit input of the graph.

Before (decode; `extend` with rows, seen, pads in the prefill graph):

    def forward(input_ids, attention_mask, position_ids):
        out = zsmerge.attention(q, k, v, mask, False, 0.125)              # q [B, H, 1, D]; k, v [B, G, 1, D]

After:

    def forward(input_ids, seen, active, layer0_key, layer0_value, ...):
        out = zsmerge.decode(q, k, v, layer0_key, layer0_value, ..., seen, active, ...)

In the decode graph position_ids becomes seen[:, None]; in the prefill graph it stays an input. The attention mask is
no input any more: what it said about padding is in `pads`, the rest in the op's arguments.
Does not fire when the graph holds no `zsmerge.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from zsmerge_compile.errors import UnsupportedGraphError
from zsmerge_compile.ops.contracts import ATTENTION
from zsmerge_compile.ops.policy import CachePolicy, Site
from zsmerge_compile.ops.state import LayerLayout

DECODE_INPUTS = ("input_ids", "seen", "active")
PREFILL_INPUTS = ("input_ids", "position_ids", "rows", "seen", "pads")


def insert_cache(
    gm: fx.GraphModule, sites: Sequence[Site], layouts: Sequence[LayerLayout], policy: CachePolicy, *, decode: bool
) -> int:
    """Insert the decode (or else the prefill) cache op at every site; returns the number of sites."""
    nodes = [node for node in gm.graph.nodes if node.target is ATTENTION]
    if not nodes:
        return 0
    inputs = _inputs(gm, DECODE_INPUTS if decode else PREFILL_INPUTS)
    call = tuple(inputs[name] for name in (("seen", "active") if decode else ("rows", "seen", "pads")))
    for node, site, layout in zip(nodes, sites, layouts, strict=True):
        state = [_placeholder(gm, f"layer{site.layer}_{field}") for field in policy.state_fields]
        with gm.graph.inserting_before(node):
            op = policy.decode_op if decode else policy.extend_op
            leading = (*node.args[:3], *state, *call)
            names = [argument.name for argument in op._schema.arguments[len(leading) :]]
            given = zip(names, policy.arguments(site, layout), strict=True)
            trailing = [_given(gm, f"layer{site.layer}_{name}", argument) for name, argument in given]
            new = gm.graph.call_function(op, (*leading, *trailing))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    _drop_old_inputs(gm, decode)
    gm.recompile()
    return len(nodes)


def _inputs(gm: fx.GraphModule, names: Sequence[str]) -> dict[str, fx.Node]:
    """The graph's inputs by name, new ones after those it has."""
    found = {node.target: node for node in gm.graph.find_nodes(op="placeholder")}
    return {name: found.get(name) or _placeholder(gm, name) for name in names}


def _placeholder(gm: fx.GraphModule, name: str) -> fx.Node:
    with gm.graph.inserting_after(_last_placeholder(gm)):
        return gm.graph.placeholder(name)


def _last_placeholder(gm: fx.GraphModule) -> fx.Node:
    return [node for node in gm.graph.nodes if node.op == "placeholder"][-1]


def _given(gm: fx.GraphModule, name: str, argument: Any) -> Any:
    """An argument as the graph can hold it: a tensor becomes a buffer."""
    if not isinstance(argument, torch.Tensor):
        return argument
    gm.register_buffer(name, argument.to(next(gm.parameters()).device))
    return gm.graph.get_attr(name)


def _drop_old_inputs(gm: fx.GraphModule, decode: bool) -> None:
    """Remove the inputs that the cache op has made unnecessary, with everything computed from them alone."""
    inputs = {node.target: node for node in gm.graph.find_nodes(op="placeholder")}
    if decode:
        with gm.graph.inserting_after(_last_placeholder(gm)):
            positions = gm.graph.call_function(torch.ops.aten.unsqueeze.default, (inputs["seen"], -1))
        inputs["position_ids"].replace_all_uses_with(positions)
    for user in list(inputs["attention_mask"].users):
        if user.target is torch.ops.aten.sym_size.int:  # its shape is that of input_ids
            user.replace_input_with(inputs["attention_mask"], inputs["input_ids"])
    gm.graph.eliminate_dead_code()
    for name in ("attention_mask", "position_ids") if decode else ("attention_mask",):
        users = list(inputs[name].users)
        if users:
            raise UnsupportedGraphError(
                f"{name} must be used by attention alone, got a use in {users[0].format_node()}; "
                "the model reads its padding mask outside attention"
            )
        gm.graph.erase_node(inputs[name])
