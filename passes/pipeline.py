"""The passes in their order, each graph verified and dumped after every one.

ZSMERGE_DUMP=dir writes `dir/<graph>/NN_<pass>.py`, numbered Python text of both graphs that `diff` can compare.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import fx

from zsmerge_compile.models.spec import ModelSpec
from zsmerge_compile.ops.policy import CachePolicy, Site
from zsmerge_compile.ops.state import LayerLayout
from zsmerge_compile.passes.classify_mask import classify_masks
from zsmerge_compile.passes.drop_repeat_kv import drop_repeat_kv
from zsmerge_compile.passes.graph import PassContext, attention_sites, value, where
from zsmerge_compile.passes.insert_cache import insert_cache
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
    graphs = {"prefill": _Graph("prefill", prefill, context), "decode": _Graph("decode", decode, context)}
    for graph in graphs.values():
        for name, rewrite in CANONICALISE:
            graph.apply(name, partial(rewrite, ctx=context))
    context.masks = classify_masks(prefill, context)  # a decode mask of one element tells nothing: prefill decides
    sites = find_sites(prefill, context)
    layouts = policy.layouts(sites)
    for name, graph in graphs.items():
        order = [layer for layer, _ in attention_sites(graph.module)]
        insert = partial(
            insert_cache,
            sites=[sites[layer] for layer in order],
            layouts=[layouts[layer] for layer in order],
            policy=policy,
            decode=name == "decode",
        )
        graph.apply("insert_cache", insert)
    counts = {name: graph.counts for name, graph in graphs.items()}
    return Rewritten(prefill, decode, sites, layouts, counts)


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
