"""What every pass owes every graph: doing its work once, and leaving alone what is no attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional as F

from tests.graphs import captured, context, trace
from zsmerge_compile.config import ZSMergeConfig
from zsmerge_compile.passes.classify_mask import classify_masks
from zsmerge_compile.passes.graph import PassContext, module_path
from zsmerge_compile.passes.insert_cache import insert_cache
from zsmerge_compile.passes.pipeline import CANONICALISE, find_sites
from zsmerge_compile.policies.zsmerge import ZSMergePolicy

SPELLINGS = [
    ("llama-gqa", "sdpa"),
    ("llama-mha", "eager"),
    ("mistral-w8", "sdpa"),
    ("falcon-7b", "eager"),
    ("falcon-new", "sdpa"),
    ("falcon-rw", "sdpa"),
]
both = pytest.mark.parametrize(("name", "attn"), SPELLINGS)


def facts(gm: fx.GraphModule) -> list[tuple[str, str, str]]:
    """Every node: its name, what it calls, and with which arguments."""
    return [(node.name, str(node.target), str((node.args, node.kwargs))) for node in gm.graph.nodes]


def cached(gm: fx.GraphModule, prefill: fx.GraphModule, ctx: PassContext, *, decode: bool) -> Callable[[], int]:
    """insert_cache with all it needs to know of the (canonical) prefill graph."""
    ctx.masks = classify_masks(prefill, ctx)
    policy, sites = ZSMergePolicy(ZSMergeConfig(8)), find_sites(prefill, ctx)
    return lambda: insert_cache(gm, sites, policy.layouts(sites), policy, decode=decode)


@both
def test_a_pass_has_nothing_left_to_do_after_itself(name: str, attn: str) -> None:
    _, ctx, graphs = captured(name, attn, layers=2)
    for gm in (graphs.prefill, graphs.decode):
        for _, rewrite in CANONICALISE:
            assert rewrite(gm, ctx) in (0, 2)
            before = facts(gm)
            assert rewrite(gm, ctx) == 0 and facts(gm) == before
    insertions = [cached(gm, graphs.prefill, ctx, decode=gm is graphs.decode) for gm in (graphs.decode, graphs.prefill)]
    for gm, insert in zip((graphs.decode, graphs.prefill), insertions, strict=True):
        assert insert() == 2
        before = facts(gm)
        assert insert() == 0 and facts(gm) == before
        for _, rewrite in CANONICALISE:
            assert rewrite(gm, ctx) == 0 and facts(gm) == before


@both
def test_masks_are_read_without_a_change(name: str, attn: str) -> None:
    _, ctx, graphs = captured(name, attn, layers=2)
    for _, rewrite in CANONICALISE:
        rewrite(graphs.prefill, ctx)
    before = facts(graphs.prefill)
    assert classify_masks(graphs.prefill, ctx) == classify_masks(graphs.prefill, ctx)
    assert facts(graphs.prefill) == before


@both
def test_nodes_that_do_not_concern_attention_are_kept(name: str, attn: str) -> None:
    """Norms, MLPs, embedding and head, with their names, arguments and order."""
    _, ctx, graphs = captured(name, attn, layers=2)
    before = {gm: elsewhere(gm) for gm in (graphs.prefill, graphs.decode)}
    for gm, kept in before.items():
        assert len(kept) > 10
        for _, rewrite in CANONICALISE:
            rewrite(gm, ctx)
            assert elsewhere(gm) == kept
    insertions = [cached(gm, graphs.prefill, ctx, decode=gm is graphs.decode) for gm in before]
    for insert, (gm, kept) in zip(insertions, before.items(), strict=True):
        insert()
        assert elsewhere(gm) == kept


def elsewhere(gm: fx.GraphModule) -> list[tuple[str, str, str]]:
    """Facts about what is computed in modules that are neither attention nor contain it; sizes aside."""
    modules = ("mlp", "norm", "ln_", "embed", "lm_head")
    paths = {node.name: module_path(node) for node in gm.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    mine = {name for name, path in paths.items() if any(part in path for part in modules) and "self_att" not in path}
    return [fact for fact in facts(gm) if fact[0] in mine]


# --- graphs that hold no attention

Step = Callable[[Tensor, Tensor], Tensor]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4))


STEPS: dict[str, Step] = {  # x [B, T, 8], weight [8, 8]
    "linear": lambda x, w: x @ w,
    "gelu": lambda x, w: F.gelu(x),
    "norm": lambda x, w: F.layer_norm(x, (8,)),
    "residual": lambda x, w: x + x.flip(-1),
    "softmax over features": lambda x, w: x.softmax(-1),
    "gate": lambda x, w: (x @ w).softmax(-1) * x,
    "heads": lambda x, w: heads(x).transpose(1, 2).transpose(1, 2).flatten(-2),
    "repeated heads": lambda x, w: heads(x)[:, :, :, None].expand(-1, -1, -1, 3, -1).mean(3).flatten(-2),
    "attention over features": lambda x, w: (heads(x).mT @ heads(x)).softmax(-1).flatten(-2)[..., :8],
    "running mean": lambda x, w: x.cumsum(1) / (1 + x.abs().cumsum(1)),
}


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6))
def test_a_graph_without_attention_is_untouched(steps: list[str]) -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        for step in steps:
            x = STEPS[step](x, w)
        return x

    inputs = torch.randn(2, 5, 8), torch.randn(8, 8)
    gm, ctx = trace(forward, *inputs), context(layers=0)
    before, expected = facts(gm), gm(*inputs)
    for _, rewrite in CANONICALISE:
        assert rewrite(gm, ctx) == 0
    assert classify_masks(gm, ctx) == {}
    assert insert_cache(gm, (), (), ZSMergePolicy(ZSMergeConfig(8)), decode=True) == 0
    assert facts(gm) == before and torch.equal(gm(*inputs), expected)
