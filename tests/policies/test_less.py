"""LESS by both eviction rules equals its formula on lists; and its weights are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu

import zsmerge_compile as zs
from tests.models_zoo import prompt, tiny
from tests.policies.following import assert_follows
from tests.policies.lists import LESS
from zsmerge_compile.errors import ConfigError, InputError
from zsmerge_compile.lower import kernels
from zsmerge_compile.ops import less
from zsmerge_compile.ops.policy import Site
from zsmerge_compile.policies.less import expected

DIM, SCALE, CLOSE = 4, 0.5, 1e-5
PATHS = ("op", "standard")


def random_weights(layers: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> dict[str, Tensor]:
    """Feature maps far from zero, of hidden size 6 and rank 3."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected(heads, kv_heads, dim, 6, 3)
    return {
        f"{layer}.{name}": torch.randn(shape, generator=generator)
        for layer in range(layers)
        for name, shape in zip(less.Maps._fields, shapes, strict=True)
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eviction", ["h2o", "streaming"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_same_tokens_and_outputs(eviction: str, path: str, data: st.DataObject) -> None:
    """Prompts with padding, steps with inactive rows, prompts on what is held: every row and head as its own list."""
    budget, seed = data.draw(st.integers(3, 10)), data.draw(st.integers(0, 2**16))
    kv_heads, repeats, batch = (data.draw(st.integers(1, 2)) for _ in range(3))
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(1, kv_heads * repeats, kv_heads, DIM, seed)
    share = data.draw(st.integers(1, budget - 1))
    told = {"recent" if eviction == "h2o" else "sinks": share}
    policy = zs.policy("less", budget=budget, weights=weights, eviction=eviction, **told)
    site = Site(0, "", "", kv_heads * repeats, kv_heads, DIM, SCALE)
    (layout,) = policy.layouts([site])
    state = policy.allocate(layout, batch, torch.float32, torch.device("cpu"))
    seen, trailing = torch.zeros(batch, dtype=torch.int64), policy.arguments(site, layout)
    runs = [op if path == "op" else kernels.standard(op) for op in (policy.decode_op, policy.extend_op)]

    def listed(head: int) -> LESS:
        maps = {name: weights[f"0.{name}"].double() for name in less.Maps._fields}
        mine = slice(head * repeats, (head + 1) * repeats)

        def phi(q: Tensor) -> Tensor:
            return gelu(gelu(q[:, None] @ maps["w1"][mine]) @ maps["w2"][mine])[:, 0].abs()

        def psi(k: Tensor) -> Tensor:
            y = maps["d1"][head].abs() * gelu(gelu(k @ maps["u1"][head]) @ maps["u2"][head])
            return (y + maps["d2"][head] * (y @ maps["mix"][head])).abs()

        by_age = eviction == "streaming"
        return LESS(budget, SCALE, recent=1 if by_age else share, sinks=share if by_age else None, phi=phi, psi=psi)

    lists = [[listed(head) for head in range(kv_heads)] for _ in range(batch)]

    def feed(n: int, pads: list[int], is_prompt: bool) -> None:
        nonlocal seen
        sizes = (kv_heads * repeats, kv_heads, kv_heads)
        q, k, v = (torch.randn(batch, heads, n, DIM, generator=generator) for heads in sizes)
        padding = torch.tensor(pads)
        if is_prompt:
            out = runs[1](3 * q, k, v, *state, torch.arange(batch), seen, padding, *trailing)
        else:
            out = runs[0](3 * q, k, v, *state, seen, padding == 0, *trailing)
        seen = seen + n - padding
        for row in range(batch):
            for head in range(kv_heads):
                mine, pad = slice(head * repeats, (head + 1) * repeats), pads[row]
                if pad == n:
                    continue
                one = lists[row][head]
                theirs = one.extend(3 * q[row, mine, pad:], k[row, head, pad:], v[row, head, pad:], is_prompt)
                assume(one.margin > 1e-5)
                torch.testing.assert_close(out[row, mine, pad:].double(), theirs, atol=CLOSE, rtol=CLOSE)
                held = state[4][row, head][state[2][row, head] > 0]
                assert sorted(held.tolist()) == [token.position for token in one.tokens]

    for _ in range(data.draw(st.integers(1, 2))):
        n = data.draw(st.integers(2, 20))
        feed(n, [data.draw(st.integers(0, n - 1)) for _ in range(batch)], is_prompt=True)
        for _ in range(data.draw(st.integers(0, 8))):
            feed(1, [int(data.draw(st.booleans())) for _ in range(batch)], is_prompt=False)


@pytest.mark.parametrize("n", [1, 5])
def test_opcheck(n: int) -> None:
    weights = random_weights(1, 4, 2, DIM)
    policy, site = zs.policy("less", budget=8, weights=weights), Site(0, "", "", 4, 2, DIM, SCALE)
    (layout,) = policy.layouts([site])
    state = policy.allocate(layout, 2, torch.float32, torch.device("cpu"))
    q, k, v = (torch.randn(2, heads, n, DIM) for heads in (4, 2, 2))
    seen, rows = torch.zeros(2, dtype=torch.int64), torch.arange(2)
    call = (seen, rows == 0) if n == 1 else (rows, seen, rows.clone())
    op = policy.decode_op if n == 1 else policy.extend_op
    torch.library.opcheck(op, (q, k, v, *state, *call, *policy.arguments(site, layout)))
    written = tuple(a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    assert written == less.STATE_FIELDS


def test_with_room_for_all_tokens_it_is_the_untouched_model() -> None:
    model, ids = tiny("llama-gqa"), prompt(1, 20)["input_ids"]
    ours = zs.compile(model, zs.policy("less", budget=60, weights=random_weights(2, 4, 2, 8)), backend="eager")
    assert_follows(ours, model, ids, 20)


def test_weights_are_those_of_the_model(tmp_path: Path) -> None:
    weights = random_weights(2, 4, 2, 8)
    save_file(weights, tmp_path / "less.safetensors")
    assert zs.compile(tiny("llama-gqa"), zs.policy("less", budget=12, weights=tmp_path / "less.safetensors"))
    with pytest.raises(ConfigError, match=r"LESS weights w1 of layer 0 must be \[4, 8, 6\], got \[4, 16, 6\]"):
        other = zs.policy("less", budget=12, weights=random_weights(2, 4, 2, 16))
        zs.compile(tiny("llama-gqa"), other, backend="eager")
    with pytest.raises(ConfigError, match="w1 of layer 1 must be given, got none; train them"):
        zs.compile(tiny("llama-gqa"), zs.policy("less", budget=12, weights=random_weights(1, 4, 2, 8)))
    with pytest.raises(ConfigError, match="layers of LESS weights must be the model's 2, got 3; train them for this"):
        zs.compile(tiny("llama-gqa"), zs.policy("less", budget=12, weights=random_weights(3, 4, 2, 8)))
    other_rank = weights | {"1.w2": torch.zeros(4, 6, 5)}
    with pytest.raises(ConfigError, match=r"LESS weights w2 of layer 1 must be \[4, 6, 3\], got \[4, 6, 5\]"):
        zs.compile(tiny("llama-gqa"), zs.policy("less", budget=12, weights=other_rank))
    with pytest.raises(ConfigError, match="weights must be a file of tools/train_less, or one of falcon, llama"):
        zs.policy("less", budget=12, weights="nowhere")
    (tmp_path / "bad").write_text("{}")
    with pytest.raises(ConfigError, match="weights must be a safetensors file"):
        zs.policy("less", budget=12, weights=tmp_path / "bad")
    with pytest.raises(ConfigError, match="eviction must be one of h2o, streaming"):
        zs.policy("less", budget=12, weights=weights, eviction="none")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": {"0.w1": 3}}, "weights must be tensors by name, got int '0.w1'"),
        ({"eviction": "streaming", "recent": 3}, "recent must be left out, as streaming eviction has none, got 3"),
        ({"sinks": 3}, "sinks must be left out, as h2o eviction has none, got 3"),
        ({"eviction": "streaming", "sinks": 12}, "sinks must be a count below the budget of 12, got 12"),
        ({"recent": 13}, "recent must be at most the budget of 12 slots, got 13"),
    ],
)
def test_parameters_that_it_does_not_use_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        zs.policy("less", **{"budget": 12, "weights": random_weights(1, 4, 2, 8), **given})


def test_weights_that_are_no_numbers_are_refused() -> None:
    weights = random_weights(2, 4, 2, 8)
    weights["1.u2"][0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match="LESS weights u2 of layer 1 must be finite, got nan or inf; train them"):
        zs.compile(tiny("llama-gqa"), zs.policy("less", budget=12, weights=weights), backend="eager")


def test_a_saved_cache_goes_to_the_same_maps_and_eviction_only(tmp_path: Path) -> None:
    """The low-rank state is a sum of what these maps made of keys: with others it would be noise, in the same shape."""
    model, path, weights = tiny("llama-gqa"), tmp_path / "cache", random_weights(2, 4, 2, 8)
    other = weights | {"1.d1": weights["1.d1"] * 1.5}
    ours, same, others, streaming = (
        zs.compile(model, zs.policy("less", budget=12, weights=maps, **told), backend="eager")
        for maps, told in (
            (weights, {"recent": 8}),
            ({name: tensor.clone() for name, tensor in reversed(weights.items())}, {"recent": 8}),
            (other, {"recent": 8}),
            (weights, {"eviction": "streaming"}),
        )
    )
    ours.prefill(prompt(1, 30)["input_ids"])
    ours.cache.save(path)
    same.cache.load(path)
    token = torch.tensor([[5]])
    torch.testing.assert_close(ours.decode(token), same.decode(token))
    for refusing, said in ((others, "h2o"), (streaming, "streaming")):
        with pytest.raises(InputError, match=f"policy of the saved cache must be 'less, {said} eviction, weights "):
            refusing.cache.load(path)
        assert not refusing.cache.seen_tokens.any()
    zs.export(ours, tmp_path / "bundle")
    bundle = zs.load(tmp_path / "bundle")
    bundle.cache.load(path)
    others.cache.save(tmp_path / "other")
    with pytest.raises(InputError, match="policy of the saved cache must be"):
        bundle.cache.load(tmp_path / "other")
