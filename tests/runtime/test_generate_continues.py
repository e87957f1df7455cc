"""After generate no pad is in any cache, and a later call goes on from the tokens that are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models_zoo import prompt
from tests.runtime.fake_step import FakeStep
from tests.runtime.turns import PAD, end_token, extended, padded, turn

Compiled = Callable[[Any, int], Any]


def test_continues_with_only_the_new_columns(model: Any, compiled: Compiled) -> None:
    run, inputs = compiled(model, 3), padded()
    out = turn(run, inputs)
    for step in range(3):
        new = prompt(3, 4, seed=10 + step)["input_ids"]
        seen = run.cache.seen_tokens.clone()
        inputs = extended(out.sequences, inputs["attention_mask"], new)
        out = turn(run, inputs, past_key_values=out.past_key_values)
        assert torch.equal(out.sequences, model.generate(**inputs, max_new_tokens=8, do_sample=False))
        assert (run.cache.seen_tokens - seen).tolist() == [1 + 4 + 7] * 3


def stopped_at_different_steps(model: Any, run: Any) -> tuple[Any, dict[str, Tensor], int]:
    inputs = padded()
    eos = end_token(model, inputs)
    out = turn(run, inputs, eos_token_id=eos)
    lengths = (out.sequences[:, 9:] != PAD).sum(1)
    assert lengths[0] < 8 and len(set(lengths.tolist())) > 1
    assert run.cache.seen_tokens.tolist() == (inputs["attention_mask"].sum(1) + lengths - 1).tolist()
    return out, inputs, eos


def test_no_pad_is_in_any_cache(model: Any) -> None:
    run = FakeStep(model, 3)
    out, inputs, _ = stopped_at_different_steps(model, run)
    for row in range(3):
        real = out.sequences[row, 2 * row :]
        assert run.tokens[row] == real[real != PAD][:-1].tolist()


def test_rows_stopped_at_different_steps_continue(model: Any, compiled: Compiled) -> None:
    run = compiled(model, 3)
    out, inputs, eos = stopped_at_different_steps(model, run)
    new = prompt(3, 3, seed=5)["input_ids"]
    turn_2 = extended(out.sequences, inputs["attention_mask"], new, eos)
    got = turn(run, turn_2, past_key_values=out.past_key_values)
    assert torch.equal(got.sequences, model.generate(**turn_2, max_new_tokens=8, do_sample=False))


def test_continuing_without_a_mask_knows_the_pads(model: Any, compiled: Compiled) -> None:
    run = compiled(model, 3)
    out, inputs, eos = stopped_at_different_steps(model, run)
    turn_2 = extended(out.sequences, inputs["attention_mask"], prompt(3, 3, seed=5)["input_ids"], eos)
    expected = model.generate(**turn_2, max_new_tokens=8, do_sample=False)
    got = turn(run, {"input_ids": turn_2["input_ids"]}, past_key_values=out.past_key_values)
    assert torch.equal(got.sequences, expected)


def test_continuing_with_new_columns_alone(llama: Any, compiled: Compiled) -> None:
    """As with any transformers cache: the mask covers all columns, the ids those the cache does not account for."""
    run = compiled(llama, 3)
    out, inputs, eos = stopped_at_different_steps(llama, run)
    turn_2 = extended(out.sequences, inputs["attention_mask"], prompt(3, 3, seed=5)["input_ids"], eos)
    expected = llama.generate(**turn_2, max_new_tokens=8, do_sample=False)
    known = out.past_key_values.get_seq_length()
    assert known == out.sequences.shape[1] - 1
    only_new = {"input_ids": turn_2["input_ids"][:, known:], "attention_mask": turn_2["attention_mask"]}
    got = turn(run, only_new, past_key_values=out.past_key_values)
    assert torch.equal(got.sequences, expected[:, known:])
    turn_3 = extended(expected, turn_2["attention_mask"], prompt(3, 2, seed=6)["input_ids"])
    again = turn(run, turn_3, past_key_values=got.past_key_values)
    assert torch.equal(again.sequences, llama.generate(**turn_3, max_new_tokens=8, do_sample=False))


def test_going_on_where_the_last_call_stopped(llama: Any, compiled: Compiled) -> None:
    run, inputs = compiled(llama, 3), padded()
    out = turn(run, inputs)
    more = turn(run, {"input_ids": out.sequences}, past_key_values=out.past_key_values)
    assert torch.equal(more.sequences, llama.generate(**inputs, max_new_tokens=16, do_sample=False))


def test_going_on_after_rows_have_stopped_feeds_their_end_token(llama: Any, compiled: Compiled) -> None:
    run = compiled(llama, 3)
    out, inputs, eos = stopped_at_different_steps(llama, run)
    more = turn(run, {"input_ids": out.sequences}, past_key_values=out.past_key_values)
    mask = extended(out.sequences, inputs["attention_mask"], out.sequences[:, :0], eos)["attention_mask"]
    for row in range(3):
        alone = out.sequences[row][mask[row].bool()][None]
        expected = llama.generate(alone, max_new_tokens=8, do_sample=False)
        assert torch.equal(more.sequences[row, -8:], expected[0, -8:])


def test_a_turn_whose_rows_differ_in_length(llama: Any, compiled: Compiled) -> None:
    run, inputs = compiled(llama, 3), padded()
    out = turn(run, inputs)
    turn_2 = extended(out.sequences, inputs["attention_mask"], prompt(3, 5, seed=3)["input_ids"])
    for row, pads in enumerate((0, 2, 4)):
        turn_2["input_ids"][row, -5 : -5 + pads] = PAD
        turn_2["attention_mask"][row, -5 : -5 + pads] = 0
    got = turn(run, turn_2, past_key_values=out.past_key_values)
    assert torch.equal(got.sequences, llama.generate(**turn_2, max_new_tokens=8, do_sample=False))


def test_the_handle_moves_on_with_the_cache(llama: Any, compiled: Compiled) -> None:
    """As a transformers cache does: the object passed in is the one that comes out, and plain tensors may come back."""
    run, inputs = compiled(llama, 3), padded()
    out = turn(run, inputs)
    handle, ids = out.past_key_values, out.sequences
    for _ in range(2):
        ids = run.generate(ids, past_key_values=handle, max_new_tokens=4, do_sample=False)
    assert torch.equal(ids, llama.generate(**inputs, max_new_tokens=16, do_sample=False))
