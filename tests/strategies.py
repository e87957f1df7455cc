"""Hypothesis strategies: the nouns of the cache (rules, tokens, paddings), small enough to shrink well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from zsmerge_compile.ops.scores import POOLINGS, SCORINGS
from zsmerge_compile.ops.sets import SETS
from zsmerge_compile.ops.state import LayerLayout, Rule, State, allocate


class Case(NamedTuple):
    """One layer's cache: its layout, its constants, and a seed for the tokens that go through it."""

    layout: LayerLayout
    rule: Rule
    batch: int
    seed: int

    def empty(self, dtype: torch.dtype = torch.float32) -> State:
        return allocate(self.layout, self.batch, dtype)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


class Tokens(NamedTuple):
    """query [b, H, n, D], key and value [b, G, n, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


def tokens(case: Case, rows: int, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tokens:
    """n random tokens for each of `rows` rows."""
    layout = case.layout

    def normal(heads: int) -> Tensor:
        return torch.randn(rows, heads, n, layout.head_dim, generator=generator).to(dtype)

    return Tokens(normal(layout.heads), normal(layout.kv_heads), normal(layout.kv_heads))


SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    windows: bool = True,
    alibi: bool = True,
    min_residual: int = 0,
    decays: tuple[float, ...] = (0.0, 0.5, 0.9, 0.98, 1.0),
) -> Case:
    """Caches of 1-12 slots, grouped heads, windows at least as large as the budget or none, ALiBi or none."""
    kv_heads, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    proximity, context = draw(st.integers(1, 5)), draw(st.integers(0, 5))
    residual = draw(st.integers(min_residual, 3))
    budget = proximity + context + residual
    window = draw(st.one_of(st.none(), st.integers(budget, budget + 6))) if windows else None
    slopes = None
    if alibi and draw(st.booleans()):
        slopes = torch.tensor([2.0 ** -(i + 1) for i in range(kv_heads * repeats)])
    layout = LayerLayout(kv_heads * repeats, kv_heads, 4, proximity, context, residual, window)
    rule = Rule(
        proximity,
        context,
        alpha=draw(st.sampled_from([0.0, 0.6, 1.0])),
        decay=draw(st.sampled_from(decays)),
        scale=0.5,
        window=window,
        merge=draw(st.sampled_from(["segment", "sequential"])),
        slopes=slopes,
        alibi_divisor=2.0,
        alibi_bf16=draw(st.booleans()),
    )
    return Case(layout, rule, draw(st.integers(1, 3)), draw(SEEDS))


def with_any_scores(case: Case) -> st.SearchStrategy[Case]:
    """The case with what any policy takes for a score."""

    def scored(**scores: Any) -> Case:
        return case._replace(rule=replace(case.rule, **scores))

    return st.builds(
        scored,
        scoring=st.sampled_from(SCORINGS),
        observed=st.integers(1, 8),
        kernel=st.sampled_from([1, 3, 5]),
        pooling=st.sampled_from(POOLINGS),
    )


def with_any_rule(case: Case) -> st.SearchStrategy[Case]:
    """`with_any_scores`, and "age" may merge as CaM does, "received" as KVMerger does."""

    def merging(case: Case, merged: int, seed: int | None, sets: dict[str, Any]) -> Case:
        rule = case.rule
        if rule.scoring == "age" and merged:
            rule = replace(rule, merged=merged, seed=None if seed is None else torch.tensor([seed]))
        if rule.scoring == "received" and rule.context > sets["pinned"]:
            rule = replace(rule, **sets)
        return case._replace(rule=rule)

    return st.builds(
        merging,
        with_any_scores(case),
        merged=st.integers(0, 6),
        seed=st.one_of(st.none(), SEEDS),
        sets=st.fixed_dictionaries(
            {
                "sets": st.sampled_from([None, *SETS]),
                "pinned": st.integers(0, 2),
                "threshold": st.sampled_from([-0.5, 0.5]),
                "sigma": st.sampled_from([1.0, 5.0]),
                "normalized": st.booleans(),
            }
        ),
    )
