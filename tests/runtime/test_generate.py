"""transformers' generate over our step gives what it gives over the untouched model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tests.models_zoo import prompt
from tests.runtime.turns import PAD, Collect, end_token, padded, same

Compiled = Callable[[Any, int], Any]


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy(model: Any, compiled: Compiled, batch: int) -> None:
    same(model, compiled(model, batch), padded(batch), max_new_tokens=12, do_sample=False)


def test_sampling_with_a_seed(model: Any, compiled: Compiled) -> None:
    options = dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.9)
    same(model, compiled(model, 3), padded(), max_new_tokens=12, **options)


def test_sampling_goes_on_in_the_other_rows_after_one_has_stopped(model: Any, compiled: Compiled) -> None:
    torch.manual_seed(7)
    free = model.generate(**padded(), max_new_tokens=12, do_sample=True, top_k=0)
    eos = int(free[1, 9 + 2])
    same(model, compiled(model, 3), padded(), max_new_tokens=12, do_sample=True, top_k=0, eos_token_id=eos)


def test_end_token_stops_rows_at_different_steps(model: Any, compiled: Compiled) -> None:
    inputs = padded()
    out = same(
        model, compiled(model, 3), inputs, max_new_tokens=16, do_sample=False, eos_token_id=end_token(model, inputs)
    )
    assert (out[0, -1] == PAD) and (out[:, -1] != PAD).any()


def test_min_and_max_lengths(llama: Any, compiled: Compiled) -> None:
    inputs, run = padded(), compiled(llama, 3)
    eos = end_token(llama, inputs, at=2)
    same(llama, run, inputs, min_new_tokens=6, max_new_tokens=10, do_sample=False, eos_token_id=eos)
    same(llama, run, inputs, max_length=15, do_sample=False)
    same(llama, run, inputs, max_new_tokens=1, do_sample=False)


class Forbid(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([self.token]), -torch.inf)


def test_logits_processors(llama: Any, compiled: Compiled) -> None:
    inputs, run = padded(), compiled(llama, 3)
    options = dict(max_new_tokens=12, do_sample=False)
    free = same(llama, run, inputs, **options)
    same(llama, run, inputs, repetition_penalty=1.5, no_repeat_ngram_size=2, **options)
    first = int(free[0, 9])
    out = same(llama, run, inputs, logits_processor=LogitsProcessorList([Forbid(first)]), **options)
    assert not (out[:, 9:] == first).any()
    same(llama, run, inputs, bad_words_ids=[[first]], prefix_allowed_tokens_fn=lambda row, ids: [5, 6, 7], **options)


class StopRow(StoppingCriteria):
    """Stops one row once it is `width` columns wide."""

    def __init__(self, row: int, width: int) -> None:
        self.row, self.width = row, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        return (rows == self.row) & (input_ids.shape[1] >= self.width)


def test_stopping_criteria(llama: Any, compiled: Compiled) -> None:
    inputs, run = padded(), compiled(llama, 3)
    free = llama.generate(**inputs, max_new_tokens=10, do_sample=False)
    never = next(token for token in range(2, 128) if not (free == token).any())
    for row in range(3):
        stop = StoppingCriteriaList([StopRow(row, 12)])
        same(llama, run, inputs, stopping_criteria=stop, max_new_tokens=10, do_sample=False, eos_token_id=never)
        seen = inputs["attention_mask"].sum(1) + torch.tensor([9, 9, 9])
        seen[row] = inputs["attention_mask"][row].sum() + 2
        assert run.cache.seen_tokens.tolist() == seen.tolist()


def test_a_row_stopped_without_an_end_token_is_padded(
    llama: Any, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here alone the tokens differ from the untouched model's, which goes on writing in a row that has stopped."""
    inputs, run = padded(), compiled(llama, 3)
    out = run.generate(
        **inputs, stopping_criteria=StoppingCriteriaList([StopRow(1, 12)]), max_new_tokens=10, do_sample=False
    )
    free = llama.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert torch.equal(out[[0, 2]], free[[0, 2]]) and torch.equal(out[1, :12], free[1, :12])
    assert (out[1, 12:] == PAD).all()
    for each in (llama, run):
        monkeypatch.setattr(each.generation_config, "pad_token_id", None)
    again = run.generate(
        **inputs, stopping_criteria=StoppingCriteriaList([StopRow(1, 12)]), max_new_tokens=10, do_sample=False
    )
    assert torch.equal(again, out)


def test_scores_and_logits(llama: Any, compiled: Compiled) -> None:
    inputs = padded()
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True)
    expected = llama.generate(**inputs, **options, output_logits=True, repetition_penalty=1.3)
    got = compiled(llama, 3).generate(**inputs, **options, output_logits=True, repetition_penalty=1.3)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def test_streamer(llama: Any, compiled: Compiled) -> None:
    inputs, ours, theirs = padded(1), Collect(), Collect()
    llama.generate(**inputs, streamer=theirs, max_new_tokens=8, do_sample=False)
    compiled(llama, 1).generate(**inputs, streamer=ours, max_new_tokens=8, do_sample=False)
    assert ours.pieces == theirs.pieces and ours.ended


def test_generation_config_object_and_defaults(llama: Any, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, run = padded(), compiled(llama, 3)
    same(llama, run, inputs, generation_config=GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=PAD))
    for each in (llama, run):
        monkeypatch.setattr(each.generation_config, "max_new_tokens", 4)
    assert same(llama, run, inputs).shape[1] == 9 + 4


def test_several_sequences_of_one_prompt(llama: Any, compiled: Compiled) -> None:
    inputs = padded(2)
    same(llama, compiled(llama, 6), inputs, num_return_sequences=3, do_sample=True, max_new_tokens=8)


def test_mask_inferred_from_pads(llama: Any, compiled: Compiled) -> None:
    inputs = {"input_ids": padded()["input_ids"]}
    same(llama, compiled(llama, 3), inputs, max_new_tokens=8, do_sample=False)


def test_starts_from_the_begin_token_without_a_prompt(llama: Any, compiled: Compiled) -> None:
    same(llama, compiled(llama, 1), {}, max_new_tokens=8, do_sample=False)


def test_every_call_starts_from_an_empty_cache(llama: Any, compiled: Compiled) -> None:
    run = compiled(llama, 3)
    for length in (9, 5, 1, 13):
        inputs = prompt(3, length, seed=length)
        same(llama, run, {"input_ids": inputs["input_ids"]}, max_new_tokens=6, do_sample=False)
        assert run.cache.seen_tokens.tolist() == [length + 5] * 3


def test_zeros_inside_a_row_of_the_mask(model: Any, compiled: Compiled) -> None:
    inputs = padded()
    inputs["attention_mask"][0, 3:5] = 0
    same(model, compiled(model, 3), inputs, max_new_tokens=8, do_sample=False)
