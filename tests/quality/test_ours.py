"""Our side of `tools/quality`: the protocol at full budget is the untouched model, whatever path judges it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from quality_tool import ours
from quality_tool.material import FACTS, PROMPT, QUICK, Material, Question, Recall, Text, make
from quality_tool.methods import ABLATIONS, METHODS, Method
from zsmerge_compile.cli.demo import ASSETS
from zsmerge_compile.ops import fold
from zsmerge_compile.ops.tokens import Tokens


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(ASSETS).eval()


@cache
def material() -> Material:
    """Two texts and two recalls of 150 tokens."""
    ids = AutoTokenizer.from_pretrained(ASSETS).encode((ASSETS / "held_out.txt").read_text())
    texts = [Text(ids[at : at + 150], ids[at + 150 : at + 160]) for at in (0, 400)]
    recalls = [Recall(text.prompt, [Question(text.truth[:4], text.truth[4:6], 0.5)] * 2) for text in texts]
    return Material(texts, recalls)


@torch.no_grad()
def test_full_budget_is_the_untouched_model() -> None:
    answers = ours.judge(model(), METHODS["zsmerge, segment"], 200, material())
    for text, loss, greedy, right in zip(material().texts, answers.losses, answers.greedy, answers.right, strict=True):
        ids = torch.tensor([text.prompt + text.truth])
        logits = model()(ids).logits[0, len(text.prompt) - 1 : -1]
        assert loss == pytest.approx(float(functional.cross_entropy(logits, ids[0, len(text.prompt) :])), abs=1e-4)
        written = model().generate(ids[:, : len(text.prompt)], max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert greedy == written[0, len(text.prompt) :].tolist()
        both = bool((logits[4:6].argmax(-1) == torch.tensor(text.truth[4:6])).all())
        assert right == [both, both]


@pytest.mark.parametrize("name", ["zsmerge, segment", "zsmerge, sequential", "H2O"])
def test_kernels_called_node_by_node_answer_as_the_reference_does(name: str) -> None:
    method = METHODS[name]
    fast = ours.judge(model(), method, 24, material())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "by_cosine", nullcontext)
        slow = ours.judge(model(), method._replace(cosine=True), 24, material())
    assert fast.losses == pytest.approx(slow.losses, abs=1e-4)
    assert fast.greedy == slow.greedy and fast.right == slow.right


def test_cosine_changes_where_tokens_are_merged_and_ends() -> None:
    before = fold.similarity
    dot, cosine = (
        ours.judge(model(), Method({"merge": "sequential", "residual": 0.5}, cosine), 24, material()).losses
        for cosine in (False, True)
    )
    assert dot != cosine and fold.similarity is before


def test_budgets_change_the_answers_and_every_method_has_a_valid_config() -> None:
    tight = ours.judge(model(), METHODS["eviction only"], 8, material()).losses
    assert tight != ours.judge(model(), METHODS["eviction only"], 200, material()).losses
    for method in (*METHODS.values(), *ABLATIONS.values()):
        assert method.config(90).budget == 90 + method.more


def test_a_mean_over_the_group_would_decide_as_the_sum_does() -> None:
    """Why the ablations have no row for it: dividing all scores of a head by one number keeps their order."""
    make_random = torch.Generator().manual_seed(0)
    score = torch.rand(2, 3, 20, generator=make_random)
    key = torch.randn(2, 3, 20, 4, generator=make_random)
    ones, position = torch.ones(2, 3, 20), torch.arange(20, dtype=torch.int32).expand(2, 3, 20)
    kept = [
        fold.choose_context(Tokens(key, key, ones, score / group, position), ones > 0, 7, 13)[0].position
        for group in (1, 4)
    ]
    assert torch.equal(*kept)


def test_material_is_the_same_at_every_call_and_facts_lie_where_it_says() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    made = make(tokenizer, QUICK)
    assert made == make(tokenizer, QUICK)
    for recall in made.recalls:
        assert len(recall.prompt) == PROMPT and len(recall.questions) == FACTS
        for question in recall.questions:
            line = question.ids + question.answer
            at = round(question.depth * (PROMPT - len(line)))
            assert recall.prompt[at : at + len(line)] == line


def test_material_survives_a_file(tmp_path: Path) -> None:
    material().save(tmp_path / "material.json")
    assert Material.load(tmp_path / "material.json") == material()
    json.loads((tmp_path / "material.json").read_text())
