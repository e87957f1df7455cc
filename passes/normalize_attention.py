"""Bring every spelling of attention to one op, `zsmerge.attention`.

Before (either spelling; shapes q [B, H, T, D], k and v [B, G, T, D], G = H in the second):

    out = aten.scaled_dot_product_attention(q, k, v, mask, scale=0.125, enable_gqa=True)

    scores = aten.add(aten.mul(aten.matmul(q, aten.transpose(k, 2, 3)), 0.125), mask)
    probs = aten.to(aten.softmax(scores, -1, torch.float32), torch.bfloat16)
    out = aten.matmul(aten.dropout(probs, 0.0, False), v)

After:

    out = zsmerge.attention(q, k, v, mask, False, 0.125)

The second spelling is read upwards from the softmax as the linear form `scale * q @ k^T + sum of factor * term`, so
scaling may come before or after masking, masks may be added, filled in or chosen by `where`, and casts may stand
anywhere. Falcon's `(scores + alibi) * inv_norm + mask` yields the mask `inv_norm * alibi + mask`.
Does not fire when a softmax is not over q @ k^T, or when its output is used by more than one product with values.
Raises UnsupportedGraphError for attention that drops out, caps its logits or attends to other than its own tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from zsmerge_compile.errors import UnsupportedGraphError, must
from zsmerge_compile.ops.contracts import ATTENTION
from zsmerge_compile.passes.graph import (
    PassContext,
    arguments,
    aten_name,
    call,
    erase_dead,
    number_sites,
    permutation,
    same_size,
    value,
    where,
)
from zsmerge_compile.passes.scores import Scores, product_below, read_scores, uncast

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAXES = ("softmax", "_softmax", "_safe_softmax")


@dataclass(frozen=True)
class _Site:
    """One attention as found: what it computes, and the node whose value that is."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float
    output: fx.Node


def normalize_attention(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Rewrite every attention; returns how many. Canonical calls get their layer (`graph.layer_index`)."""
    rewritten = 0
    for node in list(gm.graph.nodes):
        if node.target is SDPA:
            site: _Site | None = _from_sdpa(node)
        elif aten_name(node) in SOFTMAXES:
            site = _from_softmax(gm, node)
        else:
            continue
        if site is not None:
            _check(site)
            _rewrite(gm, site)
            rewritten += 1
    if rewritten:
        number_sites(gm)
        gm.graph.lint()
        gm.recompile()
    return rewritten


def _from_sdpa(node: fx.Node) -> _Site:
    given = arguments(node)
    query, scale, is_causal = given["query"], given["scale"], given["is_causal"]
    if given["dropout_p"] != 0.0:
        raise UnsupportedGraphError(must("attention dropout", "0", given["dropout_p"], where(node)))
    if not isinstance(is_causal, bool) or isinstance(scale, fx.Node):
        got = node.format_node()
        raise UnsupportedGraphError(must("is_causal and scale of attention", "constant", got, where(node)))
    scale = 1.0 / math.sqrt(value(query).shape[-1]) if scale is None else float(scale)
    return _Site(query, given["key"], given["value"], given["attn_mask"], is_causal, scale, node)


def _from_softmax(gm: fx.GraphModule, node: fx.Node) -> _Site | None:
    """The attention around a softmax over the last of four dimensions, None if there is none."""
    given = arguments(node)
    if value(node).dim() != 4 or given["dim"] not in (-1, 3):
        return None
    below = product_below(node)
    if below is None:
        return None
    scores = read_scores(gm, given["self"], node)
    if scores is None:
        return None
    with gm.graph.inserting_before(below.product):
        key = _untransposed(gm.graph, scores.key_transposed)
        query, key, values = _one_dtype(gm.graph, scores.query, key, below.values)
        mask = _mask(gm.graph, scores, value(query).dtype, node)
    return _Site(query, key, values, mask, False, scores.scale, below.product)


def _one_dtype(graph: fx.Graph, *nodes: fx.Node) -> list[fx.Node]:
    """The nodes before any cast to a wider type (the op computes in fp32 anyway, a cache should not store it)."""
    narrow = [uncast(node) for node in nodes]
    widest = max((value(node).dtype for node in narrow), key=lambda dtype: dtype.itemsize)
    return [
        node if value(node).dtype == widest else call(graph, aten.to.dtype, node, widest, like=node) for node in narrow
    ]


def _untransposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """k [B, G, T, D] from k^T."""
    if permutation(node) == [0, 1, 3, 2]:
        return node.args[0]  # type: ignore[return-value]
    return call(graph, aten.transpose.int, node, 2, 3, like=node)


def _mask(graph: fx.Graph, scores: Scores, dtype: torch.dtype, softmax: fx.Node) -> fx.Node | None:
    """What is added to the logits as one node: a bool mask, a float one of `dtype`, or None."""
    visible = _visible(graph, scores, softmax)
    total: fx.Node | None = None
    for term, factor in scores.terms:
        if factor != 1.0:
            exact = call(graph, aten.to.dtype, term, torch.float32, like=softmax)
            term = call(graph, aten.mul.Tensor, exact, factor, like=softmax)
        total = term if total is None else call(graph, aten.add.Tensor, total, term, like=softmax)
    if total is None:
        return visible
    if value(total).dtype != dtype:
        total = call(graph, aten.to.dtype, total, dtype, like=softmax)
    if visible is None:
        return total
    hidden = call(graph, aten.logical_not.default, visible, like=softmax)
    return call(graph, aten.masked_fill.Scalar, total, hidden, torch.finfo(dtype).min, like=softmax)


def _visible(graph: fx.Graph, scores: Scores, softmax: fx.Node) -> fx.Node | None:
    """The conjunction of all conditions under which a key is seen."""
    seen: fx.Node | None = None
    for condition, hides in scores.conditions:
        if value(condition).dtype != torch.bool:
            condition = call(graph, aten.to.dtype, condition, torch.bool, like=softmax)
        term = call(graph, aten.logical_not.default, condition, like=softmax) if hides else condition
        seen = term if seen is None else call(graph, aten.logical_and.default, seen, term, like=softmax)
    return seen


def _check(site: _Site) -> None:
    """Shapes the canonical op promises."""
    query, key, values = (value(node).shape for node in (site.query, site.key, site.value))
    shapes = f"{tuple(query)}, {tuple(key)}, {tuple(values)}"
    whole = len(query) == len(key) == len(values) == 4 and same_size(key[2], values[2])
    if not whole or not same_size(query[2], key[2]):
        expected = "[B, heads, T, D] each, over the same tokens"
        raise UnsupportedGraphError(must("query, key and value of attention", expected, shapes, where(site.output)))
    if query[3] != key[3] or key[3] != values[3]:
        expected = "of one head dim"
        raise UnsupportedGraphError(must("query, key and value of attention", expected, shapes, where(site.output)))
    if query[1] % key[1] or query[1] % values[1]:
        expected = f"divisors of the {query[1]} query heads"
        raise UnsupportedGraphError(must("key/value heads", expected, shapes, where(site.output)))


def _rewrite(gm: fx.GraphModule, site: _Site) -> None:
    graph, output = gm.graph, site.output
    inputs = (site.query, site.key, site.value, site.mask, site.is_causal, site.scale)
    with graph.inserting_before(output):
        new = call(graph, ATTENTION, *inputs, like=output)
        replacement = new
        if value(output).dtype != value(new).dtype:
            replacement = call(graph, aten.to.dtype, new, value(output).dtype, like=output)
    output.replace_all_uses_with(replacement)
    _erase_upwards(graph, output)


def _erase_upwards(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node nothing uses, then those of its inputs that only it used."""
    inputs: list[Any] = list(node.all_input_nodes)
    erase_dead(graph, [node])
    for used in inputs:
        if not used.users and aten_name(used):
            _erase_upwards(graph, used)
