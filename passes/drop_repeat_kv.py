"""Undo repeated key/value heads, so that the cache holds each KV head once.

Before (LLaMA with 8 query heads over G = 2 KV heads; k [B, 2, T, D], as for v):

    k_expand = aten.expand(aten.unsqueeze(k, 2), [B, 2, 4, T, D])
    k_repeat = aten.reshape(k_expand, [B, 8, T, D])
    out = zsmerge.attention(q, k_repeat, v_repeat, mask, False, 0.125)

After:

    out = zsmerge.attention(q, k, v, mask, False, 0.125)

Falcon's new decoder repeats before the rotary embedding, so there is no un-repeated k to fall back on: the op then
gets every r-th head, `aten.slice(k_rotated, 1, 0, H, r)`.
Does not fire when the repetition is not provable from the graph's structure, such as heads that merely hold equal
numbers, or heads tiled in another order than the grouped attention's (consecutive query heads share a KV head).
"""

import math
import sys
from typing import Any

import torch
from torch import fx

from zsmerge_compile.errors import UnsupportedGraphError, must
from zsmerge_compile.passes.graph import PassContext, aten_name, attention_sites, call, same_shape, value, where
from zsmerge_compile.passes.repeats import Repeats, is_whole, source_dim

aten = torch.ops.aten
HEADS = 1  # the dimension of heads in [B, heads, T, D]


def drop_repeat_kv(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Give every canonical attention its distinct KV heads; returns the number of attentions changed."""
    repeats, changed = Repeats(), 0
    for _, site in attention_sites(gm):
        key, values = _distinct(gm.graph, repeats, site)
        if (key, values) != site.args[1:3]:
            site.args = (site.args[0], key, values, *site.args[3:])
            changed += 1
    if changed:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return changed


def _distinct(graph: fx.Graph, repeats: Repeats, site: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Key and value with the same, smallest number of heads that serves both."""
    key, values = site.args[1:3]
    assert isinstance(key, fx.Node) and isinstance(values, fx.Node)  # by the op's schema
    heads = [int(value(node).shape[HEADS]) for node in (key, values)]
    factors = [repeats.factor(node, HEADS) or 1 for node in (key, values)]
    kept = math.lcm(*(count // factor for count, factor in zip(heads, factors, strict=True)))
    if any(count % kept for count in heads):
        got = " and ".join(map(str, heads))
        raise UnsupportedGraphError(must("key and value heads", "equal in number", got, where(site)))
    with graph.inserting_before(site):
        return _every(graph, key, heads[0] // kept), _every(graph, values, heads[1] // kept)


def _every(graph: fx.Graph, node: fx.Node, step: int) -> fx.Node:
    """The first of every `step` equal heads of node [B, heads, T, D]."""
    if step == 1:
        return node
    return _before_repeat(node, step) or call(graph, aten.slice.Tensor, node, HEADS, 0, sys.maxsize, step, like=node)


def _before_repeat(node: fx.Node, step: int) -> fx.Node | None:
    """x, if node is x.unsqueeze(2).expand(..., step, ...).reshape(...) or x.repeat_interleave(step, 1)."""
    if aten_name(node) == "repeat_interleave":
        found = node.args[0] if node.args[1] == step else None
    elif aten_name(node) in ("reshape", "view", "_unsafe_view", "flatten"):
        found = _unexpanded(node.args[0], step)
    else:
        found = None
    return found if isinstance(found, fx.Node) and _smaller(found, node, step) else None


def _unexpanded(node: Any, step: int) -> Any:
    """The 4-D node under clone(expand(slices(unsqueeze(x, 2)), [B, G, step, T, D]))."""
    while isinstance(node, fx.Node) and aten_name(node) in ("clone", "contiguous"):
        node = node.args[0]
    if not isinstance(node, fx.Node) or aten_name(node) not in ("expand", "broadcast_to"):
        return None
    if value(node).dim() != 5 or value(node).shape[2] != step:
        return None
    node = _unsliced(node.args[0])
    if isinstance(node, fx.Node) and aten_name(node) == "unsqueeze" and source_dim(node, 2) is None:
        return _unsliced(node.args[0])
    return None


def _unsliced(node: Any) -> Any:
    """The node under slices that take everything, which indexing with `:` leaves in a trace."""
    while isinstance(node, fx.Node) and aten_name(node) == "slice" and is_whole(node):
        node = node.args[0]
    return node


def _smaller(found: fx.Node, node: fx.Node, step: int) -> bool:
    """Whether `found` has node's shape but for its heads."""
    if value(found).dim() != 4 or value(found).shape[HEADS] * step != value(node).shape[HEADS]:
        return False
    return same_shape(found, node, but=HEADS)
