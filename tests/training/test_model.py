"""The three models before training, multi-query attention in whole heads, and going on from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.training.test_tasks import form, source, tokenizer
from training.curriculum import Forms
from training.heads import whole_heads
from training.loop import Plan, Trainer
from training.model import FAMILIES, build_model, build_optimizers, projections
from training.train import commands


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_begin_as_keys_in_every_layer(family: str) -> None:
    model = build_model(family, tokenizer())
    pairs = projections(model)
    assert len(pairs) == model.config.num_hidden_layers
    for query, key in pairs:
        heads, held = query.view(4, 32, 128), key.reshape(-1, 32, 128)
        assert torch.equal(heads, held.repeat_interleave(4 // len(held), 0)) and float(key.detach().std()) > 0.05
    assert 600_000 < sum(parameter.numel() for parameter in model.parameters()) < 750_000


def test_whole_heads_change_nothing_but_the_kernel() -> None:
    model, ids = build_model("falcon", tokenizer()), torch.arange(2 * 40).view(2, 40)
    expected = model(ids, use_cache=False).logits
    with whole_heads():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert model(ids, use_cache=False).logits.equal(expected)


def trainer(steps: int, **plan: object) -> Trainer:
    torch.manual_seed(0)
    model = build_model("llama", tokenizer())
    return Trainer(model, build_optimizers(model, 4e-3), replace(Plan("llama", 0, steps, 4e-3), **plan))


def train(made: Trainer, steps: int) -> list[torch.Tensor]:
    for _ in range(steps):
        made.step(Forms(form(1), form(2)), source(), Console(quiet=True))
    return [parameter.detach().clone() for parameter in made.model.parameters()]


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    expected = train(trainer(4), 4)
    first = trainer(4)
    train(first, 2)
    first.save(tmp_path / "state.pt")
    second = trainer(4)
    second.load(tmp_path / "state.pt")
    for ours, theirs in zip(train(second, 2), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_plan_may_get_longer_and_says_so_but_not_another(tmp_path: Path) -> None:
    first = trainer(4)
    train(first, 1)
    first.save(tmp_path / "state.pt")
    longer = trainer(9)
    longer.load(tmp_path / "state.pt")
    assert longer.progress.extended == [[1, 4]]
    first_call = "tools/train llama --seed 0 --lr 0.004 --steps 4"
    told = commands(longer.plan, longer.progress.extended)
    assert told == f"{first_call}; tools/train llama --seed 0 --lr 0.004 --steps 9 --resume"
    assert commands(first.plan, first.progress.extended) == first_call
    for other in (trainer(3), trainer(4, seed=1), trainer(4, family="mistral")):
        with pytest.raises(ValueError, match="the checkpoint's plan must be"):
            other.load(tmp_path / "state.pt")
