"""What generate cannot do is refused in one sentence, and the cache stays as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
)

from tests.runtime.turns import Collect, padded, same, turn
from zsmerge_compile.errors import CacheStateError, InputError

Compiled = Callable[[Any, int], Any]


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
    seen = run.cache.seen_tokens.clone()
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
