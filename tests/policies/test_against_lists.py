"""Every policy keeps the tokens, and gives the outputs, that its formula on lists keeps and gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import zsmerge_compile as zs
from tests.policies.lists import H2O, CaM, KVMerger, Listed, LMInfinite, SnapKV, Streaming
from zsmerge_compile.ops import decode, prefill, reference
from zsmerge_compile.ops.cpp import build
from zsmerge_compile.ops.cpp import decode as cpp_decode
from zsmerge_compile.ops.cpp import extend as cpp_extend
from zsmerge_compile.ops.policy import CachePolicy, Site
from zsmerge_compile.ops.sets import SETS
from zsmerge_compile.ops.state import Rule, State

DIM, SCALE, CLOSE = 4, 0.5, 1e-5
PATHS = ("reference", "aten", "cpp")
SLOPES = torch.tensor([0.5, 0.25])


class Choice(NamedTuple):
    """A policy, the list that is the same, and what its queries and keys know of positions."""

    policy: CachePolicy
    listed: Callable[[int], Listed]  # of a key/value head
    frequencies: Tensor | None = None
    slopes: Tensor | None = None  # of one group's heads
    window: int | None = None  # of the layer

    def site(self, kv_heads: int, repeats: int) -> Site:
        turns = None if self.frequencies is None else tuple(self.frequencies.tolist())
        slopes = None if self.slopes is None else tuple(self.slopes.tolist() * kv_heads)
        more: dict[str, Any] = dict(window=self.window, frequencies=turns, slopes=slopes)
        return Site(0, "", "", kv_heads * repeats, kv_heads, DIM, SCALE, **more)


@st.composite
def choices(draw: st.DrawFn, name: str, repeats: int) -> Choice:
    budget = draw(st.integers(3, 12))
    window = draw(st.one_of(st.none(), st.integers(budget + 1, budget + 9)))  # larger: of others the budget is theirs
    if name == "h2o":
        recent = draw(st.integers(1, budget))
        policy = zs.policy(name, budget=budget, recent=recent)
        return Choice(policy, lambda _: H2O(budget, SCALE, span=window, recent=recent), window=window)
    if name == "streaming":
        sinks, positions = draw(st.integers(0, budget - 1)), draw(st.sampled_from(["cache", "text"]))
        policy = zs.policy(name, budget=budget, sinks=sinks, positions=positions)
        if positions == "text":
            return Choice(policy, lambda _: Streaming(budget, SCALE, span=window, sinks=sinks), window=window)
        turns, slopes = draw(kinds_of_positions(repeats))
        known = dict(sinks=sinks, frequencies=turns, slopes=slopes)
        return Choice(policy, lambda _: Streaming(budget, SCALE, **known), turns, slopes)
    if name == "lm_infinite":
        sinks, positions = draw(st.integers(0, budget - 1)), draw(st.sampled_from(["cache", "text"]))
        policy, capped = zs.policy(name, budget=budget, sinks=sinks, positions=positions), positions == "cache"
        turns, slopes = draw(kinds_of_positions(repeats))
        known = dict(sinks=sinks, frequencies=turns, slopes=slopes, capped=capped)
        return Choice(policy, lambda _: LMInfinite(budget, SCALE, **known), turns, slopes)
    if name == "cam":
        sinks, merged = draw(st.integers(0, budget - 1)), draw(st.sampled_from([1, 2, 3, 5, 32]))
        seed = draw(st.one_of(st.none(), st.integers(0, 2**32 - 1)))
        drawn = {"draw": "expectation"} if seed is None else {"seed": seed}
        return Choice(
            zs.policy(name, budget=budget, sinks=sinks, merged=merged, **drawn),
            lambda head: CaM(budget, SCALE, span=window, sinks=sinks, merged=merged, seed=seed, head=head),
            window=window,
        )
    if name == "kvmerger":
        recent = draw(st.integers(1, budget - 1))
        given = dict(recent=recent, top=draw(st.integers(0, budget - recent - 1)))
        sets, normalized = draw(st.sampled_from(SETS)), draw(st.booleans())
        threshold, sigma = draw(st.sampled_from([-0.5, 0.0, 0.5, 0.75])), draw(st.sampled_from([0.5, 2.0, 5.0]))
        how = dict(threshold=threshold, sigma=sigma)
        return Choice(
            zs.policy(name, budget=budget, sets=sets, normalized=normalized, **given, **how),
            lambda _: KVMerger(budget, SCALE, **given, fixed=sets == "fixed", normalized=normalized, **how),
        )
    if name == "snapkv":
        given = dict(window=draw(st.integers(1, budget)), kernel=draw(st.sampled_from([1, 3, 5])))
        pooling = draw(st.sampled_from(["avg", "max"]))
        return Choice(
            zs.policy(name, budget=budget, pooling=pooling, **given),
            lambda _: SnapKV(budget, SCALE, pooling=pooling, **given),
        )
    return Choice(zs.policy("full", budget=100), lambda _: Listed(100, SCALE))


def kinds_of_positions(repeats: int) -> st.SearchStrategy[tuple[Tensor | None, Tensor | None]]:
    """Frequencies of rotations, slopes of ALiBi (those of one group), or neither."""
    return st.sampled_from([(None, None), (torch.tensor([1.0, 0.3]), None), (None, SLOPES[:repeats])])


class Layer:
    """One layer of a policy by one of the ways to compute it."""

    def __init__(
        self, policy: CachePolicy, path: str, kv_heads: int, repeats: int, batch: int, site: Site | None = None
    ) -> None:
        site = site or Site(0, "", "", kv_heads * repeats, kv_heads, DIM, SCALE)
        (layout,) = policy.layouts([site])
        self.rule: Rule = Rule(*policy.arguments(site, layout))
        self.state = State(*policy.allocate(layout, batch, torch.float32, torch.device("cpu")))
        self.path, self.seen = path, torch.zeros(batch, dtype=torch.int64)
        if path == "cpp":
            build.load()

    def extend(self, q: Tensor, k: Tensor, v: Tensor, pads: Tensor) -> Tensor:
        if self.path == "reference":
            out, self.state = reference.extend(self.state, q, k, v, self.seen, pads, self.rule)
        else:
            parts = cpp_extend.PARTS if self.path == "cpp" else None
            rows = torch.arange(len(pads))
            out = prefill.extend(self.state, q, k, v, rows, self.seen, pads, self.rule, parts)
        self.seen += q.shape[2] - pads
        return out

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        active = torch.ones_like(self.seen, dtype=torch.bool)
        if self.path == "reference":
            out, self.state = reference.extend(self.state, q, k, v, self.seen, ~active * 1, self.rule, decoded=True)
        else:
            attend = cpp_decode.attend if self.path == "cpp" else decode.attend
            out = decode.step(self.state, q, k, v, self.seen, active, self.rule, attend)
        self.seen += 1
        return out

    def weights(self, row: int, head: int) -> list[int]:
        return [int(weight) for weight in self.state.weight[row, head] if weight > 0]

    def positions(self, row: int, head: int) -> list[int]:
        held = self.state.position[row, head][self.state.weight[row, head] > 0]
        return sorted(int(position) for position in held)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["full", "h2o", "lm_infinite", "streaming", "cam", "kvmerger", "snapkv"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_same_tokens_and_outputs(name: str, path: str, data: st.DataObject) -> None:
    """Prompts with padding, steps, prompts on what is held: every row and head as its own list."""
    kv_heads, repeats, batch = (data.draw(st.integers(1, 2)) for _ in range(3))
    choice = data.draw(choices(name, repeats))
    layer = Layer(choice.policy, path, kv_heads, repeats, batch, choice.site(kv_heads, repeats))
    lists = [[choice.listed(head) for head in range(kv_heads)] for _ in range(batch)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))

    def tokens(n: int) -> tuple[Tensor, Tensor, Tensor]:
        heads = (kv_heads * repeats, kv_heads, kv_heads)
        q, k, v = (torch.randn(batch, h, n, DIM, generator=generator) for h in heads)
        return 3 * q, k, v

    def check(out: Tensor, new: tuple[Tensor, Tensor, Tensor], pads: list[int], prompt: bool) -> None:
        q, k, v = new
        for row in range(batch):
            for head in range(kv_heads):
                mine = slice(head * repeats, (head + 1) * repeats)
                pad, listed = pads[row], lists[row][head]
                expected = listed.extend(q[row, mine, pad:], k[row, head, pad:], v[row, head, pad:], prompt)
                assume(listed.margin > 1e-5)
                torch.testing.assert_close(out[row, mine, pad:].double(), expected, atol=CLOSE, rtol=CLOSE)
                assert layer.positions(row, head) == [token.position for token in listed.tokens]
                assert sorted(layer.weights(row, head)) == sorted(token.weight for token in listed.tokens)

    for turn in range(data.draw(st.integers(1, 2))):
        n = data.draw(st.integers(2, 20))
        pads = [data.draw(st.integers(0, n - 1)) for _ in range(batch)]
        new = tokens(n)
        check(layer.extend(*new, torch.tensor(pads)), new, pads, prompt=True)
        for _ in range(data.draw(st.integers(0, 8 if turn else 15))):
            new = tokens(1)
            check(layer.decode(*new), new, [0] * batch, prompt=False)
