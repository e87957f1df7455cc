"""LESS's trainer: what it calls H2O is the policy's, its files fit, and the shipped ones bring outputs nearer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import zsmerge_compile as zs
from tests.policies.lists import H2O, Streaming
from training import less
from zsmerge_compile.ops.less import Maps
from zsmerge_compile.ops.policy import Site
from zsmerge_compile.policies.less import FILE, SHIPPED, expected

ASSETS = Path(zs.__file__).parent / "assets"


def test_a_short_run_writes_weights_that_the_policy_takes(tmp_path: Path) -> None:
    path = tmp_path / "less.safetensors"
    less.main(["falcon", "--eviction", "streaming", "--steps", "2", "--length", "64", "--output", str(path)])
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "falcon-stdlib", local_files_only=True).eval()
    ours = zs.compile(model, zs.policy("less", budget=12, weights=path, eviction="streaming"), backend="eager")
    assert ours.prefill(torch.arange(40)[None]).isfinite().all()


def test_training_lowers_the_error() -> None:
    """A layer whose evicted values matter: one step of many leaves the error where it was or lower."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, heads, 48, 8, generator=generator) for heads in (2, 1, 1))
    layer = less.Layer(query, key, value + 1.0, 8**-0.5, torch.randn(4, 16, generator=generator))
    torch.manual_seed(0)
    held = less.kept(layer)
    maps = less.train(layer, held, 60, np.random.default_rng(0))
    assert less.error(layer, held, maps).mean() < 0.8 * less.error(layer, held, None).mean()


def test_what_is_kept_is_what_the_policy_keeps() -> None:
    """Token by token, as H2O on lists: budget + 1 tokens are attended to, then one leaves; a share for each text."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(3, 1, 80, 8, generator=generator) for _ in range(3))
    seen = less.kept(less.Layer(query, key, value, 8**-0.5, torch.eye(8)))[:, 0]
    for text, share in enumerate(less.SHARES):
        budget = max(5, round(share * 80))
        one = H2O(budget, 8**-0.5, recent=budget // 2)
        for t in range(80):
            positions = [token.position for token in one.tokens] + [t]
            assert seen[text, t].nonzero().flatten().tolist() == positions
            one.extend(query[text, :, t : t + 1], key[text, 0, t : t + 1], value[text, 0, t : t + 1], prompt=False)


def test_streaming_keeps_the_first_and_the_newest() -> None:
    query = torch.zeros(3, 2, 80, 8)
    seen = less.kept(less.Layer(query, query, query, 1.0, torch.eye(16)), "streaming")
    assert seen.shape == (3, 2, 80, 80)
    for text, share in enumerate(less.SHARES):
        one = Streaming(max(5, round(share * 80)), 1.0, sinks=less.SINKS)
        for t in range(80):
            assert seen[text, 0, t].nonzero().flatten().tolist() == [*(x.position for x in one.tokens), t]
            one.extend(*(query[text, :1, t : t + 1] if n == 0 else query[text, 0, t : t + 1] for n in range(3)), False)


def test_what_is_trained_is_what_the_ops_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a whole text at once, masked, is that of the op's steps over it; four query heads, two of keys."""
    monkeypatch.setattr(less, "SHARES", (0.1,))
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, heads, 60, 8, generator=generator) for heads in (4, 2, 2))
    layer = less.Layer(2 * q, k, v, 8**-0.5, torch.randn(5, 32, generator=generator))
    maps = Maps(*(torch.randn(shape, generator=generator) for shape in expected(4, 2, 8, 6, 3)))
    budget = round(0.1 * 60)
    weights = {f"0.{name}": tensor for name, tensor in maps._asdict().items()}
    policy = zs.policy("less", budget=budget, recent=budget // 2, weights=weights)
    site = Site(0, "", "", 4, 2, 8, layer.scale)
    (layout,) = policy.layouts([site])
    state = policy.allocate(layout, 2, torch.float32, torch.device("cpu"))
    rule, seen = policy.arguments(site, layout), torch.zeros(2, dtype=torch.int64)
    outs = []
    for t in range(60):
        one = (tensor[:, :, t : t + 1] for tensor in layer[:3])
        outs.append(policy.decode_op(*one, *state, seen + t, seen == 0, *rule))
    full = F.scaled_dot_product_attention(*layer[:3], is_causal=True, scale=layer.scale, enable_gqa=True)
    ours, theirs = (out.transpose(1, 2).flatten(2) @ layer.projection.T for out in (torch.cat(outs, 2), full))
    expected_error = (ours - theirs).square().sum((1, 2)) / theirs.square().sum((1, 2))
    held = less.kept(layer)
    torch.testing.assert_close(less.error(layer, held, maps), expected_error, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(less.judge(layer, held, maps), expected_error.mean(), rtol=1e-4, atol=1e-5)
    rows = torch.tensor([59, 7, 30])
    some = (ours - theirs)[:, rows].square().sum((1, 2)) / theirs[:, rows].square().sum((1, 2))
    torch.testing.assert_close(less.error(layer, held, maps, rows), some, rtol=1e-4, atol=1e-5)


def test_texts_longer_than_a_window_are_refused(tmp_path: Path) -> None:
    given = ["mistral", "--steps", "1", "--length", "2049", "--output", str(tmp_path / "none")]
    with pytest.raises(SystemExit, match="--length must be at most the window of 2048 tokens, got 2049"):
        less.main(given)


@pytest.mark.parametrize("family", SHIPPED)
def test_the_shipped_weights_help(family: str) -> None:
    """As recorded when they were trained: in the layer where H2O alone is furthest off, by a tenth at least."""
    folder = ASSETS / f"{family}-stdlib"
    with safe_open(folder / FILE, "pt") as file:
        errors = json.loads(file.metadata()["errors"])
    worst = max(errors, key=lambda entry: entry["h2o"])
    assert worst["less"] < 0.9 * worst["h2o"]
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    assert zs.compile(model, zs.policy("less", budget=64, weights=family), backend="eager").report.policy == "less"
