"""What the models are trained on: facts can be answered from what stands before, copies are copies."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.strategies import SEEDS
from training.corpus import SourceFile
from training.curriculum import PHASES, Curriculum, Forms, draw_batch
from training.stream import Stream
from training.tasks import (
    ANSWER,
    CODE,
    COPIED,
    FactFormat,
    code_with_facts,
    copied_code,
    fact_list,
    pairs,
    recall_prompt,
)
from zsmerge_compile.cli.demo import ASSETS

KEY_TOKENS = [1, 2]


@cache
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(ASSETS)


@cache
def source() -> Stream:
    return Stream([SourceFile("held_out", (ASSETS / "held_out.txt").read_text())] * 2, tokenizer())


@cache
def form(key_tokens: int) -> FactFormat:
    return FactFormat(tokenizer(), key_tokens)


@pytest.mark.parametrize("key_tokens", KEY_TOKENS)
def test_a_line_is_what_the_tokenizer_makes_of_it(key_tokens: int) -> None:
    facts = form(key_tokens).draw(np.random.default_rng(0), 5)
    for index in range(5):
        ids = form(key_tokens).line(facts, index).tolist()
        assert tokenizer().encode(tokenizer().decode(ids)) == ids


@given(count=st.integers(1, 100), key_tokens=st.sampled_from(KEY_TOKENS), seed=SEEDS)
def test_keys_differ_and_long_ones_share_their_beginnings(count: int, key_tokens: int, seed: int) -> None:
    keys = form(key_tokens).draw(np.random.default_rng(seed), count).keys
    assert keys.shape == (count, key_tokens) and len(np.unique(keys, axis=0)) == count
    if key_tokens == 2:
        assert len(np.unique(keys[:, 0])) <= max(2, -(-count // 3))


def answerable(ids: list[int], kind: list[int], key_tokens: int, gap: int) -> None:
    """Every asked value was stated before, after the same key; `gap` tokens lie between key and value."""
    starts = [i for i in range(len(ids)) if kind[i] == ANSWER and (i == 0 or kind[i - 1] != ANSWER)]
    for start in starts:
        question = ids[start - gap - key_tokens : start]
        earlier = [i for i in range(start - 1) if ids[i : i + len(question)] == question and i + len(question) < start]
        assert earlier, "asked before it was stated"
        stated = earlier[-1] + len(question)
        assert ids[stated : stated + 2] == ids[start : start + 2] or start + 2 > len(ids)


@given(key_tokens=st.sampled_from(KEY_TOKENS), length=st.integers(128, 700), seed=SEEDS)
def test_facts_in_code_are_answerable(key_tokens: int, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for sample in (
        code_with_facts(rng, form(key_tokens), source(), length),
        fact_list(rng, form(key_tokens), length),
        recall_prompt(rng, form(key_tokens), source(), length, 6),
    ):
        assert len(sample.ids) == len(sample.kind) == length
        answerable(sample.ids.tolist(), sample.kind.tolist(), key_tokens, gap=2)


@given(key_tokens=st.sampled_from(KEY_TOKENS), length=st.integers(32, 300), seed=SEEDS)
def test_pairs_are_answerable(key_tokens: int, length: int, seed: int) -> None:
    sample = pairs(np.random.default_rng(seed), form(key_tokens), length)
    assert len(sample.ids) == length
    answerable(sample.ids.tolist(), sample.kind.tolist(), key_tokens, gap=0)


@given(length=st.integers(64, 700), seed=SEEDS)
def test_a_copy_stands_in_the_code_before_it(length: int, seed: int) -> None:
    sample = copied_code(np.random.default_rng(seed), source(), length)
    ids, code = sample.ids.tolist(), int((sample.kind == CODE).sum())
    passage = ids[code:]
    assert len(ids) == length and int((sample.kind == COPIED).sum()) == len(passage) - 4
    assert any(ids[i : i + len(passage)] == passage for i in range(code - len(passage) + 1))


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: str(phase.lengths))
def test_every_phase_draws_batches(phase: object) -> None:
    assert sum(phase[2:6]) == pytest.approx(1)
    batch = draw_batch(np.random.default_rng(0), Forms(form(1), form(2)), source(), phase, phase.lengths[-1])
    assert batch.ids.shape == batch.kind.shape and batch.ids.shape[1] == phase.lengths[-1] + 1


def test_length_grows_once_answers_are_right() -> None:
    curriculum = Curriculum()
    for step in range(1, 200):
        if curriculum.observe(0.1 if step > 5 else None, step, 10_000):
            break
    assert curriculum.phase == 1 and 60 <= step < 150
