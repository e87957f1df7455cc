"""Thousands of steps in bfloat16: a running mean held in bfloat16 would have stopped moving long before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.properties.layer import Layer
from tests.strategies import Case, Tokens
from zsmerge_compile.ops.state import LayerLayout, Rule, State

MOMENT = 1e-3  # relative
CASE = Case(
    LayerLayout(heads=2, kv_heads=1, head_dim=8, proximity=6, context=4, residual=2),
    Rule(proximity=6, context=4, alpha=0.6, decay=0.98, scale=8**-0.5),
    batch=1,
    seed=0,
)


def drifting(generator: torch.Generator, place: float) -> Tokens:
    """A token whose key and value wander with its place in the run, 0 to 1: a mean that stops moving is left behind."""
    query = torch.randn(1, 2, 1, 8, generator=generator)
    key, value = (torch.randn(1, 1, 1, 8, generator=generator) + 1 + 2 * place for _ in range(2))
    return Tokens(query.bfloat16(), key.bfloat16(), value.bfloat16())


def moments(state: State) -> tuple[Tensor, Tensor]:
    """Sum of weight * key, and of weight * value, residual slots from their masters: [D] each, float64."""
    singles = state.weight.shape[2] - state.opened.shape[2]
    weight = state.weight[0, 0].double()
    pairs = ((state.key, state.residual_key), (state.value, state.residual_value))
    return tuple(weight @ torch.cat([held[0, 0, :singles], mean[0, 0]]).double() for held, mean in pairs)  # type: ignore[return-value]


def error(held: Tensor, total: Tensor) -> float:
    return float((held - total).norm() / total.norm())


@pytest.mark.parametrize("steps", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_weights_and_first_moments_after_many_steps(steps: int) -> None:
    generator, layer = CASE.generator(), Layer(CASE, torch.bfloat16)
    sums = torch.zeros(2, 8, dtype=torch.float64)
    mean = torch.zeros(8, dtype=torch.bfloat16)
    for step in range(steps):
        new = drifting(generator, step / steps)
        layer.decode(new)
        sums += torch.stack([new.key[0, 0, 0], new.value[0, 0, 0]]).double()
        mean += (new.key[0, 0, 0] - mean) / (step + 1)
    assert int(layer.seen) == steps and float(layer.state.weight.sum()) == steps
    for held, total in zip(moments(layer.state), sums, strict=True):
        assert error(held, total) <= MOMENT
    assert error(mean.double() * steps, sums[0]) > 10 * MOMENT, "a mean in bfloat16 would not have passed"
