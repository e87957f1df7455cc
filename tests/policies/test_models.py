"""Policies in compiled models, bundles and torch.compile; their parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zsmerge_compile as zs
from tests.bundles.made import PADS, greedy
from tests.models_zoo import KV_HEADS, prompt, tiny
from tests.policies.following import assert_follows
from tests.policies.test_less import random_weights
from zsmerge_compile.ops.policy import CachePolicy
from zsmerge_compile.policies import names

STEPS = 25
GIVEN: dict[str, dict[str, Any]] = {
    "cam": {"budget": 12, "sinks": 3, "merged": 4},
    "full": {"budget": 60},
    "h2o": {"budget": 12},
    "kvmerger": {"budget": 14},
    "less": {"budget": 12},
    "lm_infinite": {"budget": 12, "sinks": 3},
    "pyramidkv": {"budget": 14, "window": 4, "beta": 4},
    "snapkv": {"budget": 12, "window": 4},
    "streaming": {"budget": 12, "sinks": 3},
    "zeromerge": {"budget": 12},
    "zsmerge": {"budget": 12},
}


def policy_for(name: str, model: str) -> CachePolicy:
    """The policy for a tiny model."""
    more = {"weights": random_weights(2, 4, KV_HEADS[model], 8)} if name == "less" else {}
    return zs.policy(name, **GIVEN[name], **more)


def assert_same(ours: Any, theirs: Any) -> None:
    (tokens, logits), (expected, others) = greedy(ours, 2, STEPS), greedy(theirs, 2, STEPS)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, others, rtol=1e-4, atol=1e-4)


def test_every_policy_is_tried() -> None:
    assert set(GIVEN) == set(names())


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("model", ["llama-gqa", "mistral-w8", "falcon-rw"])
def test_rows_do_not_depend_on_padding_or_each_other(name: str, model: str) -> None:
    pair = zs.compile(tiny(model), policy_for(name, model), 2, backend="eager")
    single = zs.compile(tiny(model), policy_for(name, model), 1, backend="eager")
    tokens, _ = greedy(pair, 2, STEPS)
    ids = prompt(2, 30, pads=PADS[:2])["input_ids"][1:, PADS[1] :]
    logits = single.prefill(ids)
    for step in range(STEPS):
        assert int(logits.argmax()) == int(tokens[1, step])
        logits = single.decode(logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize("model", ["llama-gqa", "falcon-7b"])
def test_full_is_the_untouched_model_and_refuses_more(model: str) -> None:
    theirs = tiny(model)
    ours = zs.compile(theirs, zs.policy("full", budget=40), backend="eager")
    token = assert_follows(ours, theirs, prompt(1, 20)["input_ids"], 20)
    with pytest.raises(zs.ZSMergeError, match="tokens seen must be at most 40"):
        ours.decode(token)


def test_h2o_and_plain_eviction_are_zsmerge_without_residual() -> None:
    model = tiny("llama-gqa")
    config = zs.ZSMergeConfig(12, 0.5, residual=0, decay=1.0)
    theirs = zs.compile(model, config, 2, backend="eager")
    assert_same(zs.compile(model, zs.policy("h2o", budget=12), 2, backend="eager"), theirs)
    theirs = zs.compile(model, zs.ZSMergeConfig(12), 2, backend="eager")
    assert_same(zs.compile(model, zs.policy("zeromerge", budget=12), 2, backend="eager"), theirs)


@pytest.mark.parametrize(
    "name, format",
    [("pyramidkv", "pt2"), ("streaming", "pt2"), ("less", "pt2"), ("cam", "onnx"), ("kvmerger", "onnx")],
)
def test_compiled_and_exported(name: str, format: str, tmp_path: Path) -> None:
    model, policy = tiny("llama-gqa"), policy_for(name, "llama-gqa")
    eager = zs.compile(model, policy, 2, backend="eager")
    assert_same(zs.compile(model, policy, 2), eager)
    assert_same(zs.load(zs.export(eager, tmp_path / name, format)), eager)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "aoti", "onnx"])
@pytest.mark.parametrize("name", sorted(set(names()) - {"zsmerge", "zeromerge"}))
def test_every_format(name: str, format: str, tmp_path: Path) -> None:
    eager = zs.compile(tiny("llama-gqa"), policy_for(name, "llama-gqa"), 2, backend="eager")
    assert_same(zs.load(zs.export(eager, tmp_path / name, format)), eager)


@pytest.mark.parametrize("name", ["snapkv", "streaming"])
def test_under_torch_compile(name: str) -> None:
    model, policy = tiny("llama-gqa"), policy_for(name, "llama-gqa")
    cache = zs.new_cache(model, policy, 1)
    torch._dynamo.reset()
    options = {"config": policy, "cache": cache, "lower": "eager"}
    fast = torch.compile(model, backend="zsmerge", options=options, fullgraph=True)
    theirs, given = zs.compile(model, policy, 1, backend="eager"), prompt(1, 25)
    with torch.no_grad():
        logits = fast(**given, use_cache=False).logits[:, -1]
        torch.testing.assert_close(logits, theirs.prefill(given["input_ids"]), rtol=1e-4, atol=1e-4)
        for _ in range(15):
            token = logits.argmax(-1, keepdim=True)
            logits = fast(token, position_ids=cache.seen_tokens[:, None].clone(), use_cache=False).logits[:, -1]
            torch.testing.assert_close(logits, theirs.decode(token), rtol=1e-4, atol=1e-4)


def test_budgets_per_layer() -> None:
    model = tiny("llama-gqa")
    for name in names():
        more = {key: value for key, value in GIVEN[name].items() if key != "budget"}
        more |= {"sinks": 3} if name == "cam" else {}
        more |= {"weights": random_weights(2, 4, 2, 8)} if name == "less" else {}
        made = zs.compile(model, zs.policy(name, budget=[8, 14], **more), backend="eager")
        assert [layer.key.shape[2] for layer in made.cache.layers] == [9, 15]
        made.prefill(prompt(1, 7)["input_ids"])
    pyramid = zs.policy("pyramidkv", budget=128, window=8, beta=20)
    assert sum(pyramid.budgets(32)) / 32 == pytest.approx(128, rel=0.05)
    # (128 - 8) // 20 = 6; 2 * 120 - 6 = 234; (234 - 6) // 31 = 7
    assert pyramid.budgets(32)[:2] == (242, 235) and pyramid.budgets(32)[-1] == 234 - 31 * 7 + 8
    for length in (200, 239):  # below 2 * 120
        assert zs.policy("pyramidkv", budget=128, window=8, beta=20, length=length).budgets(3) == (128,) * 3
    for length, expected in ((240, (240, 128, 16)), (300, pyramid.budgets(3))):  # 240 - 8 is below 234: the cap
        assert zs.policy("pyramidkv", budget=128, window=8, beta=20, length=length).budgets(3) == expected
    with pytest.raises(zs.ZSMergeError, match="slots of the last layer must be at least 3, got 1 from budget 3"):
        zs.policy("pyramidkv", budget=3, window=1).budgets(2)
    assert pyramid.budgets(1) == (128,)


def test_saved_caches_name_their_policy(tmp_path: Path) -> None:
    model = tiny("llama-gqa")
    one, other = (
        zs.compile(model, zs.policy(name, budget=12, **more), backend="eager")
        for name, more in (("h2o", {"recent": 8}), ("streaming", {}))
    )
    one.cache.save(tmp_path / "cache")
    with pytest.raises(zs.ZSMergeError, match="policy of the saved cache must be 'streaming', got 'h2o'"):
        other.cache.load(tmp_path / "cache")


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("lru", {}, "policy must be one of cam, full, h2o, .* got 'lru'"),
        (["h2o"], {}, r"policy must be one of cam, full, h2o, .* got \['h2o'\]"),
        ("h2o", {}, "parameters of h2o must be budget, recent, prefill, chunk, got missing .* 'budget'"),
        ("h2o", {"budget": 12, "sinks": 4}, "parameters of h2o must be .* got an unexpected .* 'sinks'"),
        ("h2o", {"budget": 2}, "budget must be an integer of at least 3"),
        ("h2o", {"budget": 12, "recent": 13}, "recent must be at most the budget"),
        ("zsmerge", {"budget": 12, "size": 3}, "parameters of zsmerge must be budget, proximity, .* 'size'"),
        ("streaming", {"budget": 12, "sinks": 12}, "sinks must be a count below the budget of 12, got 12"),
        ("streaming", {"budget": 12, "sinks": 1.5}, "sinks must be a count below the budget of 12, got 1.5"),
        ("cam", {"budget": 12, "sinks": -1}, "sinks must be a count below the budget of 12, got -1"),
        ("cam", {"budget": 12, "merged": 0}, r"merged must be an integer from 1 to 2\*\*32 - 1, got 0"),
        ("cam", {"budget": 12, "seed": 2**32}, "seed must be an integer from 0 to .*, got 4294967296"),
        ("cam", {"budget": 12, "draw": "mean"}, "draw must be one of bernoulli, expectation, got 'mean'"),
        ("kvmerger", {"budget": 12, "top": 1.5}, r"top must be a count, or a share in \[0.0, 1.0\], got 1.5"),
        ("kvmerger", {"budget": 12, "recent": 8, "top": 4}, "recent . top must be less than the budget .*, got 8 . 4"),
        ("kvmerger", {"budget": 12, "sets": "mean"}, "sets must be one of threshold, fixed, got 'mean'"),
        ("kvmerger", {"budget": 12, "threshold": 2}, "threshold must be a cosine, .*, got 2"),
        ("kvmerger", {"budget": 12, "sigma": 0.0}, r"sigma must be a number in \[1e-6, 1e6\], .*, got 0.0"),
        ("kvmerger", {"budget": 12, "normalized": 1}, "normalized must be True or False, got 1"),
        ("snapkv", {"budget": 12, "window": 13}, "window must be at most the budget"),
        ("snapkv", {"budget": 64, "window": 0.5}, "window must be a count of at least 1, got 0.5"),
        ("snapkv", {"budget": 64, "kernel": 4}, "kernel must be odd"),
        ("snapkv", {"budget": 64, "pooling": "sum"}, "pooling must be one of avg, max, got 'sum'"),
        ("pyramidkv", {"budget": 64, "beta": 0}, "beta must be a count of at least 1"),
        ("pyramidkv", {"budget": 64, "beta": None}, "beta must be a count of at least 1, got None"),
        ("snapkv", {"budget": 64, "window": 0}, "window must be a count of at least 1, got 0"),
        ("kvmerger", {"budget": 64, "sigma": 1e200}, "sigma must be a number in .*, got 1e.200"),
        ("pyramidkv", {"budget": 64, "length": 10}, "length must be a count of at least 64"),
    ],
)
def test_parameters_are_checked(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(zs.ZSMergeError, match=message):
        zs.policy(name, **given)


def test_numbers_may_be_of_any_library() -> None:
    of_numpy = {"recent": np.float64(0.34), "top": np.int64(4), "sigma": np.float32(5), "normalized": np.bool_(True)}
    plain = {"recent": 0.34, "top": 4, "sigma": 5.0, "normalized": True}
    for budget in (np.int64(12), torch.tensor(12), np.array([12, 12])):
        made = zs.policy("kvmerger", budget=budget, **of_numpy).describe()
        expected = zs.policy("kvmerger", budget=12 if budget.ndim == 0 else (12, 12), **plain).describe()
        assert json.dumps(made) == json.dumps(expected)
    assert zs.ZSMergeConfig(np.int32(64), proximity=np.int64(8), chunk=np.int64(32)) == zs.ZSMergeConfig(
        64, proximity=8, chunk=32
    )
