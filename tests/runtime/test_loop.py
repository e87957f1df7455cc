"""Our own loop gives what transformers' loop gives over the same step: tokens, scores, cache, handle, and what follows.

However seldom it looks whether a row is still active: the steps it makes too many leave no trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

import zsmerge_compile as zs
from tests.models_zoo import VOCAB, prompt, tiny
from tests.runtime.fake_step import FakeStep
from tests.runtime.turns import Collect, padded
from tests.strategies import SEEDS
from zsmerge_compile.errors import CacheStateError
from zsmerge_compile.runtime import generate, loop
from zsmerge_compile.runtime.stopping import PadAfterStop, stops_of

POSITIONS = 26


@cache
def compressed(batch_size: int) -> Any:
    """A model of few positions, its cache smaller than most prompts."""
    model = tiny("llama-gqa", max_position_embeddings=POSITIONS)
    return zs.compile(model, zs.ZSMergeConfig(budget=6), batch_size=batch_size, backend="eager")


@contextmanager
def own_loop(every: int) -> Iterator[mock.Mock]:
    """Every call runs in our loop (asserted), which looks every `every` steps."""
    with (
        mock.patch.dict(loop.STEPS_BETWEEN_LOOKS, cpu=every),
        mock.patch.object(generate, "decode_loop", wraps=loop.decode_loop) as ran,
    ):
        yield ran
    assert ran.called


@contextmanager
def transformers_loop() -> Iterator[None]:
    with mock.patch.object(generate, "wants_each_token", return_value=True), transformers_loop_alone():
        yield


def transformers_loop_alone() -> Any:
    return mock.patch.object(generate, "decode_loop", side_effect=AssertionError)


class Call(NamedTuple):
    """One call of generate on a batch, the steps whose greedy tokens end a row, and how often our loop looks."""

    batch: int
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    ends: list[tuple[int, int]]  # (row, step)
    every: int
    seed: int


@st.composite
def calls(draw: st.DrawFn) -> Call:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    copies = batch if draw(st.booleans()) else 1
    rows = batch // copies
    pads = tuple(draw(st.lists(st.integers(0, length - 1), min_size=rows, max_size=rows)))
    given = prompt(rows, length, seed=draw(SEEDS), pads=pads)
    options: dict[str, Any] = {"max_new_tokens": draw(st.integers(1, 20)), "do_sample": draw(st.booleans())}
    options["do_sample"] = options["do_sample"] or copies > 1
    if options["do_sample"]:
        options |= draw(st.fixed_dictionaries({}, optional={"top_k": st.just(5), "temperature": st.just(0.7)}))
    extra = {
        "min_new_tokens": st.integers(1, options["max_new_tokens"]),
        "repetition_penalty": st.just(1.4),
        "no_repeat_ngram_size": st.just(2),
        "pad_token_id": st.sampled_from([0, 3, VOCAB + 7, -1]),
        "output_scores": st.booleans(),
        "output_logits": st.booleans(),
    }
    options |= draw(st.fixed_dictionaries({}, optional=extra)) | {"num_return_sequences": copies}
    looks_up = "repetition_penalty" in options or "no_repeat_ngram_size" in options
    if looks_up and batch > 1:  # transformers' processors look up the pads of rows that stopped before others
        options["pad_token_id"] = 0
    steps = st.tuples(st.integers(0, rows - 1), st.integers(0, options["max_new_tokens"] - 1))
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    ends, every = draw(st.lists(steps, max_size=4)), draw(st.sampled_from([1, 3, 8]))
    return Call(batch, inputs, options, ends, every, draw(SEEDS))


class Outcome(NamedTuple):
    """What one call and the one that continues it leave behind."""

    first: Any
    handle: list[Tensor]
    state: list[Tensor]
    random: Tensor
    second: Tensor | str
    state_after: list[Tensor]


def outcome(run: Any, call: Call, ends: list[int] | None) -> Outcome:
    torch.manual_seed(call.seed)
    options = {"pad_token_id": 0} | call.options | {"eos_token_id": ends, "return_dict_in_generate": True}
    first = run.generate(**call.inputs, **options)
    handle, random = first.past_key_values, torch.get_rng_state()
    facts, state = [handle.ids.clone(), handle.mask.clone(), handle.held.clone()], snapshot(run)
    new = prompt(call.batch, 2, seed=1)["input_ids"]
    try:  # rows that hold their last position can take no new columns, in either way
        more = dict(do_sample=False, max_new_tokens=3, past_key_values=handle, pad_token_id=0, eos_token_id=ends)
        second = run.generate(torch.cat([first.sequences, new], 1), **more)
    except ValueError as error:
        second = str(error)
    return Outcome(first, facts, state, random, second, snapshot(run))


def snapshot(run: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in (*run.cache.flat, run.cache.seen_tokens)]


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


def in_both_loops(call: Call) -> tuple[Outcome, Outcome]:
    run = compressed(call.batch)
    run.reset()
    rows = call.inputs["input_ids"].shape[0]
    repeated = {name: tensor.repeat_interleave(call.batch // rows, 0) for name, tensor in call.inputs.items()}
    with transformers_loop():
        free = run.generate(**repeated, max_new_tokens=20, do_sample=False, eos_token_id=None)
        free = free[:, repeated["input_ids"].shape[1] :]
        ends = [int(free[row, min(step, free.shape[1] - 1)]) for row, step in call.ends] or None
        theirs = outcome(run, call, ends)
    with own_loop(call.every):
        ours = outcome(run, call, ends)
    return ours, theirs


TWO = {name: prompt(2, 9, pads=(0, 4))[name] for name in ("input_ids", "attention_mask")}
ONE = {name: given[:1] for name, given in TWO.items()}
STOP_EARLY = dict(max_new_tokens=18, do_sample=False, num_return_sequences=1, output_scores=True, output_logits=True)


@settings(max_examples=40, deadline=None)
@given(call=calls())
@example(call=Call(2, TWO, STOP_EARLY, [(0, 0), (1, 1)], 8, 0))  # both rows stop long before the first look
@example(call=Call(2, TWO, STOP_EARLY | {"max_new_tokens": 30}, [], 8, 0))  # both reach their last position
@example(call=Call(1, ONE, STOP_EARLY | {"no_repeat_ngram_size": 2, "pad_token_id": -1}, [(0, 0)], 8, 0))
@example(call=Call(1, ONE, STOP_EARLY | {"repetition_penalty": 1.4, "pad_token_id": VOCAB + 7}, [(0, 0)], 8, 0))
def test_equals_transformers_loop(call: Call) -> None:
    ours, theirs = in_both_loops(call)
    assert type(ours.first) is GenerateDecoderOnlyOutput
    assert list(ours.first) == list(theirs.first)
    for name in ("sequences", "scores", "logits", "attentions", "hidden_states"):
        assert_same(getattr(ours.first, name), getattr(theirs.first, name))
    assert_same(ours.handle, theirs.handle)
    assert_same(ours.state, theirs.state)
    assert_same(ours.second, theirs.second)
    assert_same(ours.state_after, theirs.state_after)
    if call.every == 1:  # a look at every step: not one random number more is drawn
        assert torch.equal(ours.random, theirs.random)


@settings(max_examples=15, deadline=None)
@given(call=calls())
def test_no_pad_and_no_extra_step_reaches_a_cache(call: Call) -> None:
    """Over a stand-in that keeps every row's tokens."""
    run = FakeStep(compressed(1).model, call.batch)
    with own_loop(call.every):
        out = run.generate(**call.inputs, **{"pad_token_id": 0} | call.options | {"return_dict_in_generate": True})
    handle = out.past_key_values
    for row in range(call.batch):
        assert run.tokens[row] == handle.ids[row][handle.mask[row]].tolist()[:-1]


def test_looks_and_steps_are_as_few_as_they_can_be() -> None:
    """Rows that cannot stop are never looked at; rows that stop cost at most the steps to the next look."""
    run, inputs = FakeStep(tiny("llama-gqa"), 3), padded()
    steps = dict(max_new_tokens=12, do_sample=False)
    free = run.generate(**inputs, **steps)
    with own_loop(8), mock.patch.object(loop.Rows, "all_stopped", autospec=True, return_value=False) as looked:
        run.generate(**inputs, **steps)
    assert looked.call_count == 1 and run.decodes == 22
    for every, decodes in ((1, 0), (3, 2), (8, 7)):
        run.decodes = 0
        with own_loop(every):
            run.generate(**inputs, **steps, eos_token_id=free[:, 9].tolist())
        assert run.decodes == decodes


def test_columns_grow_past_the_first_allocation() -> None:
    run, inputs = FakeStep(tiny("llama-gqa"), 3), padded()
    with transformers_loop():
        expected = run.generate(**inputs, max_new_tokens=12, do_sample=False)
    with own_loop(1), mock.patch.object(loop, "_ROOM", 2):
        assert torch.equal(run.generate(**inputs, max_new_tokens=12, do_sample=False), expected)
    columns = loop.Columns(inputs["input_ids"], 10**12)  # a number that is never reached
    assert columns.view().shape == (3, 9)


@pytest.mark.parametrize(
    "options",
    [
        dict(streamer=Collect()),
        dict(stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(60.0)])),
        dict(logits_processor=LogitsProcessorList([lambda ids, scores: scores])),
        dict(prefix_allowed_tokens_fn=lambda row, ids: [5, 6]),
        dict(max_time=60.0),
        dict(max_time=0.0),
    ],
    ids=lambda options: next(iter(options)),
)
def test_whoever_sees_each_token_gets_transformers_loop(options: dict[str, Any]) -> None:
    run, model = FakeStep(tiny("llama-gqa"), 1), tiny("llama-gqa")
    with transformers_loop_alone():
        got = run.generate(**padded(1), max_new_tokens=5, do_sample=False, **options)
    assert torch.equal(got, model.generate(**padded(1), max_new_tokens=5, do_sample=False, **options))


def test_a_criterion_of_another_kind_goes_to_transformers_loop() -> None:
    """As a later transformers may make one of its own accord: the call is prepared for our loop by then."""
    run, inputs = FakeStep(tiny("llama-gqa"), 3), padded()
    expected = run.generate(**inputs, max_new_tokens=6, do_sample=False)
    with mock.patch.object(generate, "stops_of", return_value=None), transformers_loop_alone():
        assert torch.equal(run.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    strange = StoppingCriteriaList([MaxLengthCriteria(15), MaxTimeCriteria(60.0)])
    assert stops_of(strange) is None and stops_of(strange[:1]) is not None
    assert stops_of(StoppingCriteriaList([PadAfterStop()])) is None  # nothing says how wide it may get


def test_arguments_by_place_are_seen_too() -> None:
    run, streamer = FakeStep(tiny("llama-gqa"), 1), Collect()
    with pytest.raises(ValueError, match="assistant_model must be None"):
        run.generate(padded(1)["input_ids"], None, None, None, None, None, object())
    run.generate(padded(1)["input_ids"], None, None, None, None, None, None, streamer, max_new_tokens=3)
    assert len(streamer.pieces) == 4
    with pytest.raises(TypeError, match="multiple values"):
        run.generate(padded(1)["input_ids"], None, None, streamer=streamer, logits_processor=None)


def test_a_callers_own_loop_is_refused() -> None:
    with pytest.raises(ValueError, match="custom_generate must be None"):
        FakeStep(tiny("llama-gqa"), 1).generate(**padded(1), custom_generate=lambda *args, **kwargs: None)


def test_either_name_of_the_handle_continues() -> None:
    run, new = compressed(1), {"max_new_tokens": 3, "do_sample": False}
    whole = run.generate(prompt(1, 4)["input_ids"], max_new_tokens=6, do_sample=False)
    for name in ("past_key_values", "cache"):
        out = run.generate(prompt(1, 4)["input_ids"], **new, return_dict_in_generate=True)
        assert torch.equal(run.generate(out.sequences, **{name: out.past_key_values}, **new), whole)
    with pytest.raises(ValueError, match="past_key_values must be given once"):
        run.generate(out.sequences, past_key_values=out.past_key_values, cache=object())


@pytest.mark.parametrize("every", [1, 8])
def test_sampling_from_nan_is_an_error(every: int) -> None:
    model = tiny("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    run = FakeStep(model, 3)
    with own_loop(every), pytest.raises(CacheStateError, match="scores to sample from must be numbers, got NaN in"):
        run.generate(**padded(), max_new_tokens=4, do_sample=True)
    assert run.broken == [0, 1, 2]


def test_nan_that_is_looked_for_breaks_its_rows_in_our_loop_too() -> None:
    model = tiny("llama-gqa")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    run = zs.compile(model, zs.ZSMergeConfig(budget=8), batch_size=2, backend="eager", check_nan=True)
    ids = torch.tensor([[5, 6], [6, 5]])
    with (
        own_loop(8),
        pytest.raises(CacheStateError, match="NaN in rows \\[1\\]; reset"),
        mock.patch.object(loop.Draw, "__call__", lambda self, scores: torch.tensor([3, 7])),
    ):
        run.generate(ids, max_new_tokens=5, do_sample=False)
    assert run.cache.broken_rows() == [1]


def test_the_same_draws_as_torch_multinomial() -> None:
    scores = torch.randn(3, 1000) * 4
    torch.manual_seed(2)
    ours = torch.stack([loop.Draw(True, scores)(scores) for _ in range(50)])
    torch.manual_seed(2)
    theirs = torch.stack([torch.multinomial(scores.softmax(-1), 1).squeeze(1) for _ in range(50)])
    assert torch.equal(ours, theirs)
