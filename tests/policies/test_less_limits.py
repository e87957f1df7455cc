"""LESS beside the policy it evicts by, which it is where its feature maps give nothing; what its ops leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import zsmerge_compile as zs
from tests.bundles.made import greedy
from tests.models_zoo import KV_HEADS, tiny
from tests.policies.test_less import random_weights
from zsmerge_compile.lower import kernels
from zsmerge_compile.ops import less
from zsmerge_compile.ops.policy import CachePolicy, Site
from zsmerge_compile.ops.state import State

DIM, SITE = 8, Site(0, "", "", 4, 2, 8, 0.5)
ALIBI = Site(0, "", "", 4, 2, 8, 0.5, window=11, slopes=(0.5, 0.25, 0.125, 0.0625))
SPARSE: dict[str, dict[str, Any]] = {
    "h2o": {"budget": 8, "recent": 3},
    "streaming": {"budget": 8, "sinks": 2, "positions": "text"},
}


def less_as(eviction: str, weights: dict[str, Tensor]) -> CachePolicy:
    given = {name: value for name, value in SPARSE[eviction].items() if name != "positions"}
    return zs.policy("less", weights=weights, eviction=eviction, **given)


def begun(policy: CachePolicy, site: Site, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], tuple[Any, ...]]:
    """An empty state of two rows, and the op's trailing arguments."""
    (layout,) = policy.layouts([site])
    return list(policy.allocate(layout, 2, dtype, torch.device("cpu"))), policy.arguments(site, layout)


def tokens(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, heads, n, DIM, generator=generator) for heads in (4, 2, 2))
    return 2 * q, k, v


def assert_hold_the_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Key, value, weight, score and position of what is held, whose slots are in no order of their own."""
    for mine, its in zip(in_order(ours), in_order(theirs), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


def in_order(state: Sequence[Tensor]) -> list[Tensor]:
    """The first five tensors by position, empty slots last and zero."""
    held = state[2] > 0
    order = torch.where(held, state[4], 2**31 - 1).argsort(2)
    moved = [t.gather(2, order[..., None].expand_as(t) if t.dim() == 4 else order) for t in state[:5]]
    live = held.gather(2, order)
    return [torch.where(live[..., None] if t.dim() == 4 else live, t, 0) for t in moved]


@pytest.mark.parametrize("eviction", SPARSE)
def test_what_leaves_is_what_leaves_without_the_low_rank_part(eviction: str) -> None:
    """Of the same queries, keys and values both hold the same tokens with the same scores; the outputs differ."""
    generator, rows = torch.Generator().manual_seed(0), torch.arange(2)
    policies = [less_as(eviction, random_weights(1, 4, 2, DIM)), zs.policy(eviction, **SPARSE[eviction])]
    (ours, our_rule), (theirs, their_rule) = (begun(policy, SITE) for policy in policies)
    given = tokens(20, generator)
    outs = [
        policy.extend_op(*given, *state, rows, torch.zeros(2, dtype=torch.int64), torch.tensor([0, 4]), *rule)
        for policy, state, rule in zip(policies, (ours, theirs), (our_rule, their_rule), strict=True)
    ]
    torch.testing.assert_close(outs[0], outs[1])  # nothing was evicted when the prompt attended
    differed, seen = 0.0, torch.tensor([20, 16])
    for _ in range(30):
        given, active = tokens(1, generator), torch.ones(2, dtype=torch.bool)
        one = policies[0].decode_op(*given, *ours, seen, active, *our_rule)
        other = policies[1].decode_op(*given, *theirs, seen, active, *their_rule)
        differed, seen = differed + float((one - other).abs().max()), seen + 1
        assert_hold_the_same(ours, theirs)
    assert differed > 1


@pytest.mark.parametrize("eviction", SPARSE)
@pytest.mark.parametrize("model", ["llama-gqa", "mistral-w8", "falcon-rw"])
def test_with_maps_of_zeros_it_is_the_policy_it_evicts_by(eviction: str, model: str) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in random_weights(2, 4, KV_HEADS[model], 8).items()}
    policies = less_as(eviction, zeros), zs.policy(eviction, **SPARSE[eviction])
    ours, theirs = (zs.compile(tiny(model), policy, 2, backend="eager") for policy in policies)
    (found, logits), (expected, others) = greedy(ours, 2, 25), greedy(theirs, 2, 25)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, others, rtol=1e-4, atol=1e-4)
    for mine, its in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        assert_hold_the_same(*([getattr(layer, name) for name in State._fields] for layer in (mine, its)))
        assert not mine.low_rank.any() and not mine.normalizer.any()


@pytest.mark.parametrize("site", [SITE, ALIBI], ids=["causal", "alibi-window"])
@pytest.mark.parametrize("eviction", SPARSE)
def test_a_step_is_an_extend_of_one_token(eviction: str, site: Site) -> None:
    generator, rows = torch.Generator().manual_seed(1), torch.arange(2)
    policy = less_as(eviction, random_weights(1, 4, 2, DIM))
    (stepped, rule), (extended, _) = (begun(policy, site) for _ in range(2))
    seen, no_pads = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for _ in range(40):
        given = tokens(1, generator)
        one = policy.decode_op(*given, *stepped, seen, no_pads == 0, *rule)
        other = policy.extend_op(*given, *extended, rows, seen, no_pads, *rule)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert_hold_the_same(stepped, extended)
        for mine, its in zip(stepped[9:], extended[9:], strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)
        seen = seen + 1
    assert stepped[10].all()


@pytest.mark.parametrize("path", ["op", "standard"])
def test_inactive_rows_and_rows_of_padding_keep_all_they_have(path: str) -> None:
    generator, rows = torch.Generator().manual_seed(2), torch.arange(2)
    policy = less_as("h2o", random_weights(1, 4, 2, DIM))
    state, rule = begun(policy, SITE)
    decode, extend = (op if path == "op" else kernels.standard(op) for op in (policy.decode_op, policy.extend_op))
    seen, pads = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    extend(*tokens(30, generator), *state, rows, seen, pads, *rule)
    before = [tensor.clone() for tensor in state]
    decode(*tokens(1, generator), *state, seen + 30, torch.tensor([True, False]), *rule)
    out = extend(*tokens(5, generator), *state, rows, torch.tensor([31, 30]), torch.tensor([1, 5]), *rule)
    assert not out[1].any() and not out[0, :, :1].any() and out.isfinite().all()
    changed = {
        name for name, now, old in zip(less.STATE_FIELDS, state, before, strict=True) if (now[0] != old[0]).any()
    }
    assert {"key", "score", "low_rank", "normalizer"} <= changed
    assert all(torch.equal(now[1], old[1]) for now, old in zip(state, before, strict=True))


def test_half_precision_is_near_single() -> None:
    """Streaming, so that no rounding decides who leaves; the low-rank state itself stays in single precision."""
    policy, rows = less_as("streaming", random_weights(1, 4, 2, DIM)), torch.arange(2)
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(3)
        state, rule = begun(policy, SITE, dtype)
        prompt = [tensor.bfloat16().to(dtype) for tensor in tokens(20, generator)]
        seen = torch.zeros(2, dtype=torch.int64)
        policy.extend_op(*prompt, *state, rows, seen, seen, *rule)
        for step in range(10):
            given = [tensor.bfloat16().to(dtype) for tensor in tokens(1, generator)]
            outs.append(policy.decode_op(*given, *state, seen + 20 + step, seen == 0, *rule))
        assert state[9].dtype == state[10].dtype == torch.float32 and outs[-1].dtype == dtype
    for single, half in zip(outs[:10], outs[10:], strict=True):
        torch.testing.assert_close(single, half.float(), rtol=3e-2, atol=3e-2)
