"""LESS's trainer: what it calls H2O is the policy's, its files fit, and the shipped ones bring outputs nearer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import zsmerge_compile as zs
from training import less
from zsmerge_compile.policies.less import FILE, SHIPPED

ASSETS = Path(zs.__file__).parent / "assets"


def test_a_short_run_writes_weights_that_the_policy_takes(tmp_path: Path) -> None:
    path = tmp_path / "less.safetensors"
    less.main(["falcon", "--steps", "2", "--length", "64", "--output", str(path)])
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "falcon-stdlib", local_files_only=True).eval()
    ours = zs.compile(model, zs.policy("less", budget=12, weights=path), backend="eager")
    assert ours.prefill(torch.arange(40)[None]).isfinite().all()


def test_training_lowers_the_error() -> None:
    """A layer whose evicted values matter: one step of many leaves the error where it was or lower."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, heads, 48, 8, generator=generator) for heads in (2, 1, 1))
    layer = less.Layer(query, key, value + 1.0, 8**-0.5, None, torch.randn(4, 16, generator=generator))
    torch.manual_seed(0)
    maps, held = less.train(layer, 60, np.random.default_rng(0)), less.kept(layer)
    assert less.error(layer, held, maps).mean() < 0.8 * less.error(layer, held, None).mean()


def test_what_is_kept_is_what_the_policy_keeps() -> None:
    """Token by token, as H2O on lists: budget + 1 tokens are attended to, then one leaves."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 1, 80, 8, generator=generator) for _ in range(3))
    layer = less.Layer(query, key, value, 8**-0.5, None, torch.eye(8))
    seen = less.kept(layer)[0, 0]
    budget = round(less.SHARE * 80)
    from tests.policies.lists import H2O

    one = H2O(budget, 8**-0.5, recent=budget // 2)
    for t in range(80):
        positions = [token.position for token in one.tokens] + [t]
        assert seen[t].nonzero().flatten().tolist() == positions
        one.extend(query[0, :, t : t + 1], key[0, 0, t : t + 1], value[0, 0, t : t + 1], prompt=False)


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
