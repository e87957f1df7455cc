"""What follows from CaM's formula, besides `test_against_lists.py`; and its draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zsmerge_compile as zs
from tests.policies.test_against_lists import DIM, PATHS, SCALE, Layer
from tests.states import assert_same_states
from zsmerge_compile.ops import cam
from zsmerge_compile.ops.policy import Site


def tokens(n: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [batch, 2, n, DIM] of two heads."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, 2, n, DIM, generator=generator) for _ in range(3))
    return q, k, v


def filled(path: str, new: tuple[Tensor, Tensor, Tensor], first: int, **parameters: object) -> Layer:
    """A layer of a policy after a prompt of `first` tokens and as many steps as there are others."""
    policy = zs.policy(str(parameters.pop("name", "cam")), **{"budget": 8, "sinks": 2, **parameters})
    layer = Layer(policy, path, 2, 1, new[0].shape[0])
    layer.extend(*(t[:, :, :first] for t in new), torch.zeros(new[0].shape[0], dtype=torch.int64))
    for step in range(first, new[0].shape[2]):
        layer.decode(*(t[:, :, step : step + 1] for t in new))
    return layer


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_merged_of_tokens_without_attention(path: str) -> None:
    """Each query sees the newest token alone: p is 0, and the cache is that of streaming, to the bit."""
    q, k, v = tokens(40)
    k = torch.zeros_like(k)
    k[..., 0], q[..., 0] = torch.arange(40.0), 500.0
    ours, theirs = (filled(path, (q, k, v), 20, name=name) for name in ("cam", "streaming"))
    assert all(torch.equal(a, b) for a, b in zip(ours.state, theirs.state, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("draw", ["bernoulli", "expectation"])
def test_chunks_of_one_token_are_steps(path: str, draw: str) -> None:
    new = tokens(30, batch=2)
    stepped = filled(path, new, 1, draw=draw)
    chunked = Layer(zs.policy("cam", budget=8, sinks=2, draw=draw), path, 2, 1, 2)
    for t in range(30):
        chunked.extend(*(part[:, :, t : t + 1] for part in new), torch.zeros(2, dtype=torch.int64))
    assert_same_states(chunked.state, stepped.state)


@pytest.mark.parametrize("path", PATHS)
def test_merged_values_keep_the_output_of_the_last_query(path: str) -> None:
    """As far as no p is cut: sum over kept j of A_j v_j' is the output of full attention."""
    n, budget, sinks = 30, 12, 2
    q, k, v = tokens(n)
    q[..., 0], k[..., 0] = 2.0, 0.2 * torch.arange(n)  # the newer, the more attention
    layer = filled(path, (q, k, v), n, budget=budget, sinks=sinks, merged=budget - sinks, draw="expectation")
    logits = (q[:, :, -1:] @ k.mT * SCALE)[:, :, 0]
    weights = torch.softmax(logits, -1)  # [1, 2, n]
    assert (weights[..., sinks : sinks - budget].amax(-1) < weights[..., sinks - budget :].mean(-1)).all()
    live = layer.state.weight > 0
    kept = torch.where(live, weights.gather(2, layer.state.position.long()), 0.0)
    torch.testing.assert_close(kept[:, :, None] @ layer.state.value, weights[:, :, None] @ v)


def test_the_expectation_is_the_mean_of_the_draws() -> None:
    new, seeds = tokens(12), 400
    expected = filled("aten", new, 8, draw="expectation").state.value
    drawn = torch.stack([filled("aten", new, 8, seed=seed).state.value for seed in range(seeds)])
    error = drawn.std(0) / seeds**0.5
    assert (drawn.std(0) > 0.01).any()
    assert ((drawn.mean(0) - expected).abs() <= 4 * error + 1e-6).all()


def test_draws_are_the_seed_s() -> None:
    new = tokens(40, batch=2)
    reference, aten, cpp = (filled(path, new, 20, seed=5).state for path in PATHS)
    assert_same_states(aten, reference)
    assert_same_states(cpp, reference)
    assert not torch.equal(filled("aten", new, 20, seed=6).state.value, aten.value)
    alone = filled("aten", tuple(part[1:] for part in new), 20, seed=5)  # type: ignore[arg-type]
    torch.testing.assert_close(alone.state.value[0], aten.value[1])


def test_draws_are_uniform_and_independent() -> None:
    """Of seeds, layers, heads and positions, each followed by the next."""
    sets = torch.stack(
        [
            cam.uniform(cam.layer_seed(seed, layer), torch.arange(512).expand(1, 8, -1))[0]
            for seed in range(4)
            for layer in range(16)
        ]
    ).unflatten(0, (4, 16))  # [seeds, layers, heads, positions]
    assert sets.min() >= 0 and sets.max() < 1 and sets.unique().numel() > 0.98 * sets.numel()
    counts = torch.histc(sets, 64, 0, 1)
    expected = sets.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 4 * (2 * 63) ** 0.5
    for dim in range(4):
        size = sets.shape[dim] - 1
        pair = torch.stack([sets.narrow(dim, 0, size).flatten(), sets.narrow(dim, 1, size).flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / pair.shape[1] ** 0.5


@pytest.mark.parametrize("merged", [3, 50])
def test_a_layer_whose_window_fits_the_budget_merges_nothing(merged: int) -> None:
    policy = zs.policy("cam", budget=8, sinks=2, merged=merged)
    layer = Layer(policy, "aten", 2, 1, 1, Site(0, "", "", 2, 2, DIM, SCALE, window=6))
    q, k, v = tokens(30)
    layer.extend(q, k, v, torch.zeros(1, dtype=torch.int64))
    for step in range(10):
        q, k, v = tokens(1, seed=step)
        layer.decode(q, k, v)
    held = layer.state.value[layer.state.weight > 0]
    given = torch.cat([tokens(30)[2], *(tokens(1, seed=step)[2] for step in range(10))], 2)[:, :, -5:]
    assert held.shape[0] == 2 * 5 and torch.equal(held.sort(0).values, given.reshape(-1, DIM).sort(0).values)
