"""What follows from KVMerger's formula, besides `test_against_lists.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zsmerge_compile as zs
from tests.policies.test_against_lists import DIM, PATHS, SCALE, Layer
from zsmerge_compile.ops import sets
from zsmerge_compile.ops.policy import Site
from zsmerge_compile.ops.state import Rule
from zsmerge_compile.ops.tokens import Tokens


def tokens(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, 2, n, DIM] of two heads."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, n, DIM, generator=generator) for _ in range(3))
    return q, k, v


def prompted(n: int, path: str = "aten", site: Site | None = None, **parameters: Any) -> Layer:
    """A layer after a prompt of n tokens."""
    policy = zs.policy("kvmerger", **{"budget": 16, "recent": 4, "top": 4, **parameters})
    layer = Layer(policy, path, 2, 1, 1, site)
    layer.extend(*tokens(n), torch.tensor([0]))
    return layer


def members(key: Tensor, value: Tensor, score: Tensor | None = None) -> Tokens:
    """Tokens of one head, [n, D] each."""
    n = key.shape[0]
    score = torch.arange(float(n)) if score is None else score
    position = torch.arange(n, dtype=torch.int32)
    return Tokens(key[None, None], value[None, None], torch.ones(1, 1, n), score[None, None], position[None, None])


@pytest.mark.parametrize("path", PATHS)
def test_no_token_of_a_prompt_is_lost(path: str) -> None:
    for how in sets.SETS:
        layer = prompted(100, path, sets=how)
        assert (layer.state.weight.sum(-1) == 100).all()
        live = (layer.state.weight > 0).sum(-1)
        assert (live == 16).all() if how == "fixed" else (live <= 16).all()
        assert (layer.state.weight > 1).any()
        total = layer.state.score.sum(-1)  # each of 100 queries gave 1 to what is held
        torch.testing.assert_close(total, torch.full_like(total, 100.0))


@pytest.mark.parametrize("path", PATHS)
def test_fixed_merges_nothing_that_fits(path: str) -> None:
    layer = prompted(16, path, sets="fixed")
    assert layer.positions(0, 0) == layer.positions(0, 1) == list(range(16))
    assert (layer.state.weight <= 1).all()
    merged = prompted(16, path, threshold=-1.0)
    assert ((merged.state.weight > 0).sum(-1) == 9).all() and (merged.state.weight.amax(-1) == 8).all()


def test_decoded_tokens_are_lost_one_by_one_and_a_later_prompt_merges_again() -> None:
    layer = prompted(100, sets="fixed")
    before = layer.state.weight.sum(-1)
    for step in range(5):
        q, k, v = tokens(1, seed=step)
        layer.decode(q, k, v)
    assert (layer.state.weight.sum(-1) < before + 5).all() and ((layer.state.weight > 0).sum(-1) == 16).all()
    held = layer.state.weight.sum(-1)
    q, k, v = tokens(1, seed=9)
    layer.extend(q, k, v, torch.tensor([0]))
    assert (layer.state.weight.sum(-1) == held + 1).all() and ((layer.state.weight > 0).sum(-1) == 16).all()


def test_equal_keys_add_their_values_up() -> None:
    key, value = torch.ones(6, DIM), torch.randn(6, DIM)
    rule = Rule(1, 1, 0.0, 1.0, 1.0, sets="fixed")
    summed = sets.merge(members(key, value), 1, rule)
    torch.testing.assert_close(summed.key[0, 0], key[:1])
    torch.testing.assert_close(summed.value[0, 0, 0], value.sum(0))
    mean = sets.merge(members(key, value), 1, Rule(1, 1, 0.0, 1.0, 1.0, sets="fixed", normalized=True))
    torch.testing.assert_close(mean.value[0, 0, 0], value.mean(0))
    assert summed.weight.item() == 6 and summed.position.item() == 5 and summed.score.item() == 15


def test_far_members_leave_the_pivot_as_it_is() -> None:
    key, value, score = torch.randn(5, DIM), torch.randn(5, DIM), torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0])
    rule = Rule(1, 1, 0.0, 1.0, 1.0, sets="fixed", sigma=1e-3)
    merged = sets.merge(members(key, value, score), 1, rule)
    assert torch.equal(merged.key[0, 0, 0], key[3])  # of equal scores the newer
    torch.testing.assert_close(merged.value[0, 0, 0], 5 * value[3])


def test_the_threshold_parts_sets_and_the_slots_bound_them() -> None:
    """Directions at these angles: cosines 1, 0.5, 1, 0, 0.8."""
    angles = torch.tensor([0.0, 0.0, 60.0, 60.0, 150.0, 186.87]).deg2rad()
    key = torch.stack([angles.cos(), angles.sin()], -1)
    for slots, threshold, weights in (
        (6, 0.75, [2, 2, 2, 0, 0, 0]),
        (6, 0.9, [2, 2, 1, 1, 0, 0]),
        (3, 0.9, [2, 2, 2]),
        (2, 0.9, [4, 2]),
        (1, 0.9, [6]),
        (4, -1.0, [6, 0, 0, 0]),
    ):
        merged = sets.merge(members(key, key), slots, Rule(1, 1, 0.0, 1.0, 1.0, sets="threshold", threshold=threshold))
        assert merged.weight[0, 0].tolist() == weights


def test_a_layer_whose_window_fits_the_budget_merges_nothing() -> None:
    layer = prompted(50, site=Site(0, "", "", 2, 2, DIM, SCALE, window=12))
    assert layer.positions(0, 0) == list(range(39, 50)) and (layer.state.weight <= 1).all()
