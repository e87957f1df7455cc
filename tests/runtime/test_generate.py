"""transformers' generate over our step gives what it gives over the untouched model, and leaves no pad in a cache."""

import logging
import threading
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
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from tests.models_zoo import prompt, tiny
from tests.runtime.fake_step import FakeStep
from zsmerge_compile.errors import CacheStateError, InputError

Compiled = Callable[[Any, int], Any]
NAMES = ("llama-gqa", "falcon-7b", "falcon-rw")
PAD = 0


@pytest.fixture
def compiled() -> Compiled:
    """compiled(model, batch_size), at full budget; the one place to change what these tests run over."""
    return FakeStep


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.fixture
def llama() -> Any:
    return tiny("llama-gqa")


def padded(batch: int = 3, length: int = 9) -> dict[str, Tensor]:
    """input_ids and attention_mask, every row but the first padded differently on the left."""
    inputs = prompt(batch, length, pads=tuple(2 * row for row in range(batch)))
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def end_token(model: Any, inputs: dict[str, Tensor], at: int = 4) -> int:
    """A token that row 0 generates at step `at` of greedy search: rows then stop at different steps."""
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    return int(out[0, inputs["input_ids"].shape[1] + at])


def same(model: Any, run: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Both models' sequences, asserted equal."""
    torch.manual_seed(7)
    expected = model.generate(**inputs, **options)
    torch.manual_seed(7)
    got = run.generate(**inputs, **options)
    assert torch.equal(got, expected)
    return got


# ---- the same tokens


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


def test_a_row_stopped_without_an_end_token_is_padded(llama: Any, compiled: Compiled) -> None:
    """Here alone the tokens differ from the untouched model's, which goes on writing in a row that has stopped."""
    inputs, run = padded(), compiled(llama, 3)
    out = run.generate(
        **inputs, stopping_criteria=StoppingCriteriaList([StopRow(1, 12)]), max_new_tokens=10, do_sample=False
    )
    free = llama.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert torch.equal(out[[0, 2]], free[[0, 2]]) and torch.equal(out[1, :12], free[1, :12])
    assert (out[1, 12:] == PAD).all()
    llama.generation_config.pad_token_id = None
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


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamer(llama: Any, compiled: Compiled) -> None:
    inputs, ours, theirs = padded(1), Collect(), Collect()
    llama.generate(**inputs, streamer=theirs, max_new_tokens=8, do_sample=False)
    compiled(llama, 1).generate(**inputs, streamer=ours, max_new_tokens=8, do_sample=False)
    assert ours.pieces == theirs.pieces and ours.ended


def test_generation_config_object_and_defaults(llama: Any, compiled: Compiled) -> None:
    inputs, run = padded(), compiled(llama, 3)
    same(llama, run, inputs, generation_config=GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=PAD))
    llama.generation_config.max_new_tokens = 4
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


# ---- the cache afterwards, and continuing from it


def turn(run: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    return run.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True} | options)


def extended(sequences: Tensor, mask: Tensor, new: Tensor, eos: int | None = None) -> dict[str, Tensor]:
    """A caller's next turn: the sequences and new columns, the mask 0 after each row's end token."""
    generated = sequences[:, mask.shape[1] :]
    ended = torch.zeros_like(generated) if eos is None else (generated == eos).long()
    valid = (ended.cumsum(1) - ended) == 0
    columns = torch.cat([sequences, new], 1)
    return {"input_ids": columns, "attention_mask": torch.cat([mask, valid.long(), torch.ones_like(new)], 1)}


def test_continues_with_only_the_new_columns(model: Any, compiled: Compiled) -> None:
    run, inputs = compiled(model, 3), padded()
    out = turn(run, inputs)
    for step in range(3):
        new = prompt(3, 4, seed=10 + step)["input_ids"]
        seen = run.cache.seen_tokens
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


# ---- refused, with the cache as it was


REFUSED: dict[str, dict[str, Any]] = {
    "num_beams must be 1": dict(num_beams=3),
    "assistant_model must be None": dict(assistant_model=object()),
    "prompt_lookup_num_tokens must be None": dict(prompt_lookup_num_tokens=4),
    "penalty_alpha must be 0": dict(penalty_alpha=0.6, top_k=4),
    "use_cache must be True": dict(use_cache=False),
    "output_attentions must be False": dict(output_attentions=True, return_dict_in_generate=True),
    "output_hidden_states must be False": dict(output_hidden_states=True, return_dict_in_generate=True),
    "guidance_scale must be 1": dict(guidance_scale=1.5),
    "cache_implementation must be None": dict(cache_implementation="static"),
    "prefill_chunk_size must be None": dict(prefill_chunk_size=4),
    "inputs_embeds must be None": dict(inputs_embeds=torch.zeros(3, 9, 32)),
    "position_ids must be None": dict(position_ids=torch.zeros(3, 9, dtype=torch.long)),
    "got 3 rows times num_return_sequences 2": dict(num_return_sequences=2, do_sample=True),
    "past_key_values must be what an earlier generate": dict(past_key_values=object()),
    "not used by the model": dict(tempreature=2.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_arguments_leave_the_cache_as_it_was(llama: Any, compiled: Compiled, message: str) -> None:
    run = compiled(llama, 3)
    out = turn(run, padded())
    seen = run.cache.seen_tokens
    with pytest.raises(ValueError, match=message):
        run.generate(**padded(), max_new_tokens=4, **REFUSED[message])
    if message.startswith("num_beams"):
        with pytest.raises(InputError, match=message):
            run.generate(**padded(), generation_config=GenerationConfig(num_beams=2, max_new_tokens=4))
    assert torch.equal(run.cache.seen_tokens, seen)
    turn(run, {"input_ids": out.sequences}, past_key_values=out.past_key_values)


def bad_prompts() -> dict[str, dict[str, Tensor]]:
    good, right = padded(), padded()
    right["attention_mask"][1, -2:] = 0
    empty_row = padded()
    empty_row["attention_mask"][2] = 0
    return {
        "must be 3 rows, the batch size compiled for, got 2 rows": {name: t[:2] for name, t in good.items()},
        "the last column of attention_mask must be 1 in every row, got 0 in row 1; pad on the left": right,
        "got 0 in row 2": empty_row,
        r"at least one column, got \[3, 0\]": {"input_ids": torch.zeros(3, 0, dtype=torch.long)},
        r"attention_mask must be of input_ids' shape \[3, 9\], got \[3, 7\]": {
            "input_ids": good["input_ids"],
            "attention_mask": good["attention_mask"][:, :7],
        },
    }


@pytest.mark.parametrize("message", bad_prompts())
def test_bad_prompts_leave_the_cache_as_it_was(compiled: Compiled, llama: Any, message: str) -> None:
    run = compiled(llama, 3)
    out = turn(run, padded())
    with pytest.raises(InputError, match=message):
        run.generate(**bad_prompts()[message], max_new_tokens=4)
    more = turn(run, {"input_ids": out.sequences}, past_key_values=out.past_key_values)
    assert torch.equal(more.sequences, llama.generate(**padded(), max_new_tokens=16, do_sample=False))


def test_a_handle_of_another_state_is_refused(llama: Any, compiled: Compiled) -> None:
    run = compiled(llama, 3)
    first = turn(run, padded())
    second = turn(run, padded())
    match = "past_key_values must be the state that the cache is in"
    with pytest.raises(InputError, match=match):
        turn(run, {"input_ids": first.sequences}, past_key_values=first.past_key_values)
    turn(run, {"input_ids": second.sequences}, past_key_values=second.past_key_values)
    run.decode(torch.ones(3, 1, dtype=torch.long))
    with pytest.raises(InputError, match=match):
        turn(run, {"input_ids": second.sequences}, past_key_values=second.past_key_values)
    third = turn(run, padded())
    run.reset()
    with pytest.raises(InputError, match=match):
        turn(run, {"input_ids": third.sequences}, past_key_values=third.past_key_values)
    other = compiled(llama, 3)
    theirs = turn(other, padded())
    turn(run, padded())
    with pytest.raises(InputError, match=match):
        turn(run, {"input_ids": theirs.sequences}, past_key_values=theirs.past_key_values)


def test_columns_that_do_not_continue_the_cache_are_refused(llama: Any, compiled: Compiled) -> None:
    run = compiled(llama, 3)
    out = turn(run, padded())
    handle, ids = out.past_key_values, out.sequences
    changed = ids.clone()
    changed[1, 5] = 99
    wrong: dict[str, dict[str, Tensor]] = {
        "token 3 of row 1 of input_ids must be": {"input_ids": changed},
        "input_ids must be at least 17 columns wide": {"input_ids": ids[:, -3:]},
        "row 0 of input_ids must be the 16 tokens that the cache holds and at least one new": {
            "input_ids": ids[:, -3:],
            "attention_mask": torch.ones(3, 3),
        },
        "attention_mask must be between 3 and 20 columns wide, got 40": {
            "input_ids": ids[:, -3:],
            "attention_mask": torch.ones(3, 40),
        },
    }
    with pytest.raises(InputError, match="num_return_sequences must be 1"):
        turn(run, {"input_ids": ids[:1]}, past_key_values=handle, num_return_sequences=3, do_sample=True)
    for message, inputs in wrong.items():
        with pytest.raises(InputError, match=message):
            turn(run, inputs, past_key_values=handle)
    more = turn(run, {"input_ids": ids}, past_key_values=handle)
    assert torch.equal(more.sequences, llama.generate(**padded(), max_new_tokens=16, do_sample=False))


class Interrupt(Collect):
    def put(self, value: Tensor) -> None:
        super().put(value)
        if len(self.pieces) == 4:
            raise KeyboardInterrupt


def test_an_interrupted_call_can_be_repeated(llama: Any, compiled: Compiled) -> None:
    run = compiled(llama, 1)
    out = turn(run, padded(1))
    with pytest.raises(KeyboardInterrupt):
        run.generate(**padded(1), streamer=Interrupt(), max_new_tokens=8)
    with pytest.raises(InputError, match="past_key_values"):
        turn(run, {"input_ids": out.sequences}, past_key_values=out.past_key_values)
    same(llama, run, padded(1), max_new_tokens=8, do_sample=False)


class Nested(Collect):
    run: Any = None

    def put(self, value: Tensor) -> None:
        self.run.generate(value.reshape(1, -1), max_new_tokens=2)


def test_a_call_within_a_call_is_refused(llama: Any, compiled: Compiled) -> None:
    nested = Nested()
    nested.run = compiled(llama, 1)
    with pytest.raises(CacheStateError, match="generate must have returned"):
        nested.run.generate(**padded(1), streamer=nested, max_new_tokens=4)


def test_only_generate_calls_the_model(llama: Any, compiled: Compiled) -> None:
    run = compiled(llama, 1)
    with pytest.raises(InputError, match="must be called by generate"):
        run(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(InputError, match="generate_batch"):
        run.generate_batch([[1, 2, 3]])


# ---- pipelines


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words w2 ... w127, of the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1} | {f"w{i}": i for i in range(2, 128)}
    core = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", return_token_type_ids=False, padding_side="left"
    )


def test_text_generation_pipeline(
    llama: Any, tokenizer: Any, compiled: Compiled, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    options = dict(max_new_tokens=8, do_sample=False)
    texts = ["w5 w9 w17 w3", "w8 w8", "w101 w9 w33"]
    expected = pipeline("text-generation", model=llama, tokenizer=tokenizer)(texts, batch_size=3, **options)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        ours = pipeline("text-generation", model=compiled(llama, 3), tokenizer=tokenizer)
        got = ours(texts, batch_size=3, **options)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert got == expected
    assert "compiled" in repr(ours).lower() or "FakeStep" in repr(ours)
    assert [record.message for record in caplog.records] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_text_streamer_in_a_thread(llama: Any, tokenizer: Any, compiled: Compiled) -> None:
    ids = tokenizer("w5 w9 w17", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    run = compiled(llama, 1)
    worker = threading.Thread(target=run.generate, args=(ids,), kwargs=dict(streamer=streamer, max_new_tokens=6))
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert text.split() == tokenizer.decode(llama.generate(ids, max_new_tokens=6)[0, 3:]).split()


def test_stays_on_its_device(llama: Any, compiled: Compiled) -> None:
    run = compiled(llama, 1)
    assert run.to("cpu") is run
    with pytest.raises(InputError, match="device must be cpu"):
        run.to("cuda:1")
