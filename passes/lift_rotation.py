"""Take rotary embedding out of the graph where the policy rotates queries and keys by itself (`ops/places.py`).

Before (x, y are the projections, cos and sin [B, 1, T, D] of position_ids):

    q = x * cos + cat([-x[..., D/2:], x[..., :D/2]]) * sin;  k likewise of y
    out = zsmerge.attention(q, k, v, mask, False, 0.125)

After:

    out = zsmerge.attention(x, y, v, mask, False, 0.125)       # the frequencies are told to the cache op

The frequencies are read off the graph at position 1, and its cosines and sines compared with theirs at others.
Does not fire in a model with ALiBi, which has nothing to lift. Refused: other pairs than i and i + D/2, frequencies
that depend on the length of the text or differ between a layer's queries and keys, positions of another kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from zsmerge_compile.errors import UnsupportedGraphError, must
from zsmerge_compile.ops.policy import Site
from zsmerge_compile.passes.evaluate import Rows, needed
from zsmerge_compile.passes.graph import aten_name, attention_sites, call, value, where

TRIED = (0, 1, 2, 63, 1000)  # positions; and the model's last
CLOSE = 1e-5
_SAME = ("to", "_to_copy", "unsqueeze", "expand", "clone", "contiguous", "alias")


class Rotation(NamedTuple):
    """x * cos + half(x) * sin."""

    raw: fx.Node
    cos: fx.Node
    sin: fx.Node


def find_rotations(gm: fx.GraphModule, sites: Sequence[Site], max_positions: int | None) -> tuple[Site, ...]:
    """The sites with the frequencies of their rotations, read off the prefill graph, which is not changed.

    Raises UnsupportedGraphError.
    """
    nodes = dict(attention_sites(gm))
    known: dict[tuple[fx.Node, fx.Node], tuple[tuple[float, ...], float]] = {}
    found = []
    for site in sites:
        node = nodes[site.layer]
        query, key = (_rotation(side, node, site) for side in node.args[:2])
        if query is None or key is None:
            found.append(site)
            continue
        if (query.cos, query.sin) != (key.cos, key.sin):
            raise UnsupportedGraphError(must("rotations of queries and keys", "the same", "two", where(node)))
        pair = query.cos, query.sin
        if pair not in known:
            known[pair] = _read(gm, *pair, site.head_dim, max_positions, node)
        frequencies, magnitude = known[pair]
        found.append(replace(site, frequencies=frequencies, magnitude=magnitude))
    return tuple(found)


def lift_rotation(gm: fx.GraphModule, sites: Sequence[Site]) -> int:
    """Give every canonical attention its queries and keys unrotated; returns the number of attentions changed."""
    changed = 0
    for layer, node in attention_sites(gm):
        site = sites[layer]
        if site.frequencies is None:
            continue
        with gm.graph.inserting_before(node):
            raw = [_raw(gm.graph, side, node, site) for side in node.args[:2]]
        node.args = (*raw, *node.args[2:])
        changed += 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return changed


def _raw(graph: fx.Graph, side: Any, node: fx.Node, site: Site) -> fx.Node:
    rotation = _rotation(side, node, site)
    if rotation is None:
        raise UnsupportedGraphError(must("queries and keys", "rotated as in the prefill graph", where(node)))
    if aten_name(side) == "slice":  # some of the heads, see `drop_repeat_kv`
        return call(graph, side.target, rotation.raw, *side.args[1:], like=side)
    return rotation.raw


def _rotation(side: Any, node: fx.Node, site: Site) -> Rotation | None:
    """The rotation that a query or key comes from; None in a model with ALiBi. Raises UnsupportedGraphError."""
    if site.slopes is not None:
        return None
    source = side.args[0] if aten_name(side) == "slice" and side.args[1] == 1 else side
    sums = source.all_input_nodes if aten_name(source) == "add" else []
    products = [used for used in sums if aten_name(used) == "mul"]
    for plain, turned in (products, products[::-1]) if len(products) == 2 else ():
        raw, half = plain.args[0], turned.args[0]
        if isinstance(half, fx.Node) and isinstance(raw, fx.Node) and _is_half_of(half, raw):
            cos, sin = plain.args[1], turned.args[1]
            if isinstance(cos, fx.Node) and isinstance(sin, fx.Node):
                return Rotation(raw, _bare(cos), _bare(sin))
    expected = "x * cos + rotate_half(x) * sin, so that positions can be counted by place in the cache"
    raise UnsupportedGraphError(must("queries and keys", expected, aten_name(source), where(node)))


def _is_half_of(half: fx.Node, raw: fx.Node) -> bool:
    """Whether it is cat([-x[..., D/2:], x[..., :D/2]], -1)."""
    dim = int(value(raw).shape[-1])
    if aten_name(half) != "cat" or half.args[1] not in (-1, 3):
        return False
    pieces: Any = half.args[0]
    if len(pieces) != 2 or aten_name(pieces[0]) != "neg":
        return False
    return _slice_of(pieces[0].args[0], raw, dim // 2, dim) and _slice_of(pieces[1], raw, 0, dim // 2)


def _slice_of(node: Any, raw: fx.Node, start: int, stop: int) -> bool:
    if aten_name(node) != "slice" or node.args[0] is not raw or node.args[1] not in (-1, 3):
        return False
    return node.args[2] == start and min(node.args[3], int(value(raw).shape[-1])) == stop and len(node.args) < 5


def _bare(node: fx.Node) -> fx.Node:
    """Without casts and views, which say nothing of the numbers."""
    while aten_name(node) in _SAME:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _read(
    gm: fx.GraphModule, cos: fx.Node, sin: fx.Node, head_dim: int, max_positions: int | None, node: fx.Node
) -> tuple[tuple[float, ...], float]:
    """Frequencies [D/2] and magnitude of a rotation."""
    tried = torch.tensor(sorted({*TRIED, *([max_positions - 1] if max_positions else [])}))
    if max_positions:
        tried = tried[tried < max_positions]
    angle = next((used for used in needed(cos) if aten_name(used) == "cos"), None)
    if angle is None:
        raise UnsupportedGraphError(must("cosines of the rotation", "computed from positions", "a table", where(node)))
    angles, cosines, sines = (_at(gm, used, tried) for used in (angle.args[0], cos, sin))  # type: ignore[arg-type]
    frequencies, magnitude = angles[1, : head_dim // 2], float(cosines[0, 0])
    expected = (tried[:, None].float() * frequencies).repeat(1, 2)  # in fp32, as the model
    for got, f in ((cosines, torch.cos), (sines, torch.sin)):
        if got.shape != expected.shape or float((got - magnitude * f(expected)).abs().max()) > CLOSE * magnitude:
            expected_text = "of one frequency for each pair, whatever the length of the text"
            raise UnsupportedGraphError(must("the rotation", expected_text, "another", where(node)))
    return tuple(frequencies.tolist()), magnitude


def _at(gm: fx.GraphModule, node: fx.Node, positions: Tensor) -> Tensor:
    """The node's value [n, D] for one row at these positions."""
    inputs = {"input_ids": torch.zeros(1, len(positions), dtype=torch.int64)}
    inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"]), "position_ids": positions[None]}
    device = next(gm.parameters()).device
    with torch.no_grad():
        found: Tensor = Rows(gm, {name: t.to(device) for name, t in inputs.items()}, positions).full(node)
    return found.reshape(-1, found.shape[-1]).float().cpu()
