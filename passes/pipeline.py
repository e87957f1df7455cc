"""The passes in their order, each graph verified and dumped after every one.

ZSMERGE_DUMP=dir writes `dir/<graph>/NN_<pass>.py`, numbered Python text of both graphs that `diff` can compare.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import fx

from zsmerge_compile.errors import UnsupportedGraphError, must
from zsmerge_compile.models.spec import ModelSpec
from zsmerge_compile.ops.policy import CachePolicy, Site
from zsmerge_compile.ops.state import LayerLayout
from zsmerge_compile.passes.classify_mask import classify_masks, confirm_masks
from zsmerge_compile.passes.drop_repeat_kv import drop_repeat_kv
from zsmerge_compile.passes.graph import PassContext, attention_sites, value, where
from zsmerge_compile.passes.insert_cache import insert_cache
from zsmerge_compile.passes.lift_rotation import find_rotations, lift_rotation
from zsmerge_compile.passes.masks import MaskKind
from zsmerge_compile.passes.normalize_attention import normalize_attention
from zsmerge_compile.passes.verify import verify

Pass = Callable[..., int]  # (gm, ctx) -> rewrites

CANONICALISE: tuple[tuple[str, Pass], ...] = (
    ("normalize_attention", normalize_attention),  # first: every later pass looks for the one canonical op
    ("drop_repeat_kv", drop_repeat_kv),  # before the cache is inserted: it decides how many heads are cached
)


class Rewritten(NamedTuple):
    """Both graphs with their cache ops, and what was found on the way."""

    prefill: fx.GraphModule
    decode: fx.GraphModule
    sites: tuple[Site, ...]
    layouts: tuple[LayerLayout, ...]
    counts: dict[str, dict[str, int]]


def run(prefill: fx.GraphModule, decode: fx.GraphModule, spec: ModelSpec, policy: CachePolicy) -> Rewritten:
    """Rewrite both graphs in place.

    Raises UnsupportedGraphError or UnsupportedMaskError, naming the node, for attention that is not understood.
    """
    context = PassContext(spec)
    graphs = (_Graph("prefill", prefill, context), _Graph("decode", decode, context))
    for graph in graphs:
        graph.canonicalise()
    context.masks = classify_masks(prefill, context)  # a decode mask of one element tells nothing: prefill decides
    sites = find_sites(prefill, context)
    if policy.places != "text":
        sites = find_rotations(prefill, sites, spec.max_positions)
    layouts = policy.layouts(sites)
    for graph in graphs:
        graph.insert_cache(sites, layouts, policy)
    counts = {graph.name: graph.counts for graph in graphs}
    return Rewritten(prefill, decode, sites, layouts, counts)


def run_one(
    name: str,
    gm: fx.GraphModule,
    spec: ModelSpec,
    sites: tuple[Site, ...],
    layouts: tuple[LayerLayout, ...],
    policy: CachePolicy,
) -> dict[str, int]:
    """Rewrite one graph ("prefill" or "decode", any outputs) of a model whose sites another trace has found.

    Returns the rewrites per pass. Raises as `run`, and UnsupportedGraphError for attention other than at those sites.
    """
    context = PassContext(spec, {site.layer: _mask(site) for site in sites}, logits_only=False)
    graph = _Graph(name, gm, context)
    graph.canonicalise()
    for found, known in zip(find_sites(gm, context), sites, strict=True):
        for field in ("heads", "kv_heads", "head_dim", "scale"):
            if getattr(found, field) != getattr(known, field):
                what, got = f"{field} of layer {known.layer}", getattr(found, field)
                expected = f"{getattr(known, field)}, as in the model that the cache is for"
                raise UnsupportedGraphError(must(what, expected, got, found.source))
    confirm_masks(gm, context)
    graph.insert_cache(sites, layouts, policy)
    return graph.counts


def _mask(site: Site) -> MaskKind:
    """The mask that was found at a site."""
    kind: Any = "alibi" if site.slopes else "sliding_window" if site.window else "causal"
    return MaskKind(kind, site.window, site.slopes, site.alibi_divisor, site.alibi_bf16)


def find_sites(gm: fx.GraphModule, context: PassContext) -> tuple[Site, ...]:
    """The canonical attentions of the prefill graph, by layer, with their masks."""
    sites = []
    for layer, node in sorted(attention_sites(gm), key=lambda site: site[0]):
        query, key = value(node.args[0]), value(node.args[1])  # type: ignore[arg-type]
        mask = context.masks[layer]
        sites.append(
            Site(
                layer=layer,
                name=node.name,
                source=where(node),
                heads=int(query.shape[1]),
                kv_heads=int(key.shape[1]),
                head_dim=int(query.shape[3]),
                scale=float(node.args[5]),  # type: ignore[arg-type]
                window=mask.window,
                slopes=mask.slopes,
                alibi_divisor=mask.alibi_divisor,
                alibi_bf16=mask.alibi_bf16,
            )
        )
    return tuple(sites)


class _Graph:
    """One graph on its way through the passes."""

    def __init__(self, name: str, module: fx.GraphModule, context: PassContext) -> None:
        self.name, self.module, self.context = name, module, context
        self.counts: dict[str, int] = {}
        self._dump("captured")

    def canonicalise(self) -> None:
        for name, rewrite in CANONICALISE:
            self.apply(name, partial(rewrite, ctx=self.context))

    def insert_cache(self, sites: Sequence[Site], layouts: Sequence[LayerLayout], policy: CachePolicy) -> None:
        """And before it, where the policy rotates queries and keys by itself, take their rotations away."""
        if policy.places != "text":
            self.apply("lift_rotation", partial(lift_rotation, sites=sites))
        order = [layer for layer, _ in attention_sites(self.module)]
        insert = partial(
            insert_cache,
            sites=[sites[layer] for layer in order],
            layouts=[layouts[layer] for layer in order],
            policy=policy,
            decode=self.name == "decode",
        )
        self.apply("insert_cache", insert)

    def apply(self, name: str, rewrite: Callable[[fx.GraphModule], int]) -> None:
        """Run one pass, count its rewrites, verify and dump the result."""
        self.counts[name] = rewrite(self.module)
        verify(self.module, name, self.context)
        self._dump(name)

    def _dump(self, name: str) -> None:
        dump(self.name, len(self.counts), name, self.module)


def dump(graph: str, number: int, name: str, module: fx.GraphModule) -> None:
    """Write `graph` ("prefill" or "decode") as it is after pass `name` to $ZSMERGE_DUMP, if that is set."""
    folder = os.environ.get("ZSMERGE_DUMP")
    if folder:
        path = Path(folder) / graph / f"{number:02d}_{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(module.print_readable(print_output=False))
