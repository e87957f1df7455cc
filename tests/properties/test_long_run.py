"""Thousands of steps: bytes, weights and moments stay. A mean held in bfloat16 would have stopped moving."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

import zsmerge_compile as zs
from tests.models_zoo import VOCAB, tiny
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("steps", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_weights_and_first_moments_after_many_steps(steps: int, dtype: torch.dtype) -> None:
    generator, layer = CASE.generator(), Layer(CASE, dtype)
    places = [(tensor.data_ptr(), tensor.nbytes) for tensor in layer.state]
    sums = torch.zeros(2, 8, dtype=torch.float64)
    mean = torch.zeros(8, dtype=torch.bfloat16)
    for step in range(steps):
        new = Tokens(*(tensor.to(dtype) for tensor in drifting(generator, step / steps)))
        layer.decode(new)
        sums += torch.stack([new.key[0, 0, 0], new.value[0, 0, 0]]).double()
        mean += (new.key[0, 0, 0] - mean) / (step + 1)
    assert int(layer.seen) == steps and float(layer.state.weight.sum()) == steps
    for held, total in zip(moments(layer.state), sums, strict=True):
        assert error(held, total) <= MOMENT
    assert error(mean.double() * steps, sums[0]) > 10 * MOMENT, "a mean in bfloat16 would not have passed"
    assert places == [(tensor.data_ptr(), tensor.nbytes) for tensor in layer.state]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compiled_model_after_100_000_steps(dtype: torch.dtype) -> None:
    """Bytes and addresses constant, weights and first moments right in every head, the last steps no slower."""
    steps, tenth = 100_000, 10_000
    model = tiny("llama-gqa", dtype, max_position_embeddings=steps + 1)
    compiled = zs.compile(model, zs.ZSMergeConfig(64), backend="inductor")
    layers = [State(**vars(layer)) for layer in compiled.cache.layers]
    ring = compiled.program.layouts[0].proximity + 1
    places = [(tensor.data_ptr(), tensor.nbytes) for tensor in compiled.cache.flat]
    sums = [torch.zeros(2, 2, 8, dtype=torch.float64) for _ in layers]  # [key or value, G, D]
    tokens = torch.randint(VOCAB, (steps, 1, 1), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(steps)
    for step in range(steps):
        started = time.perf_counter()
        compiled.decode(tokens[step])
        times[step] = time.perf_counter() - started
        for state, total in zip(layers, sums, strict=True):
            total += torch.stack([state.key[0, :, step % ring], state.value[0, :, step % ring]]).double()
    assert places == [(tensor.data_ptr(), tensor.nbytes) for tensor in compiled.cache.flat]
    assert int(compiled.cache.seen_tokens) == steps
    for state, total in zip(layers, sums, strict=True):
        assert state.weight.sum(-1).tolist() == [[steps, steps]]
        singles = state.weight.shape[2] - state.opened.shape[2]
        for held, mean, expected in zip(state[:2], (state.residual_key, state.residual_value), total, strict=True):
            every = torch.cat([held[0, :, :singles].double(), mean[0].double()], 1)  # [G, S, D]
            found = (state.weight[0].double()[..., None] * every).sum(1)
            assert bool(((found - expected).norm(dim=-1) <= MOMENT * expected.norm(dim=-1)).all())
    first, last = times[tenth : 2 * tenth].median(), times[-tenth:].median()
    assert last <= 1.1 * first, (float(first), float(last))
