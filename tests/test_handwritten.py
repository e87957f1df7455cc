"""A decoder that is not from transformers compiles through a spec file of its own."""

from __future__ import annotations

import inspect

import pytest
import torch

import tests.handwritten_spec
import zsmerge_compile as zs
from tests.handwritten import storyteller
from tests.models_zoo import prompt
from tests.test_equivalence import assert_same_logits
from zsmerge_compile.testing import Oracle, check_equivalence
from zsmerge_compile.testing.tolerance import DECISION


def test_the_spec_is_short() -> None:
    assert len(inspect.getsource(tests.handwritten_spec).splitlines()) < 60


def test_what_the_passes_find() -> None:
    report = zs.compile(storyteller(), zs.ZSMergeConfig(24), backend="eager").report
    assert report.model == "Storyteller" and report.passes["decode"]["drop_repeat_kv"] == 3
    assert [(site.layer, site.heads, site.kv_heads) for site in report.sites] == [(0, 4, 2), (1, 4, 2), (2, 4, 2)]
    assert all("mixer" in site.source and "handwritten.py" in site.source for site in report.sites)


def test_full_budget_is_the_model_itself() -> None:
    model = storyteller()
    compiled = zs.compile(model, zs.ZSMergeConfig(40), batch_size=3, backend="eager")
    x = prompt(3, 36, pads=(0, 7, 19))
    ids, mask = x["input_ids"], x["attention_mask"]
    with torch.no_grad():
        expected = model(ids, mask.bool(), x["position_ids"])
    logits = compiled.prefill(ids[:, :20], mask[:, :20])
    for t in range(20, 36):
        assert_same_logits(logits, expected[:, t - 1], f"column {t}")
        logits = compiled.decode(ids[:, t : t + 1])


def test_past_the_budget_it_is_zsmerge_on_lists() -> None:
    model, config = storyteller(), zs.ZSMergeConfig(24, proximity=9, residual=4)
    compiled = zs.compile(model, config, batch_size=3, backend="eager")
    oracle = Oracle(model, [(9, 11, 4)] * 3, batch=3, kv_heads=2, call=tests.handwritten_spec.last_scores)
    x, fed = prompt(3, 30, pads=(0, 7, 19)), prompt(3, 300, seed=1)["input_ids"]
    ours, theirs = (side.prefill(x["input_ids"], x["attention_mask"]) for side in (compiled, oracle))
    for step in range(300):
        assert_same_logits(ours, theirs, f"step {step}, margin {oracle.margin:.1e}")
        ours, theirs = (side.decode(fed[:, step : step + 1]) for side in (compiled, oracle))
    assert oracle.margin > DECISION


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_equivalence_takes_it(dtype: torch.dtype) -> None:
    report = check_equivalence(storyteller(dtype), max_examples=5, batch_sizes=(2,), steps=12, kv_heads=2)
    assert report.model == "Storyteller" and len(report.checks) == 2 and not report.skipped
