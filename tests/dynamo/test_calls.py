"""Calls of the model under torch.compile(backend="zsmerge") give what zs.compile gives, and write the same cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zsmerge_compile as zs
from tests.dynamo.made import CONFIG, Pair, pair
from tests.models_zoo import VOCAB, prompt, tiny


def assert_close(logits: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def assert_greedy_steps_agree(both: Pair, logits: tuple[Tensor, Tensor], steps: int) -> None:
    for _ in range(steps):
        assert_close(logits)
        logits = both.token(logits[1].argmax(-1, keepdim=True))
    assert_close(logits)
    both.assert_same_cache()


def test_it_is_registered() -> None:
    assert "zsmerge" in torch._dynamo.list_backends()


@pytest.mark.parametrize(
    "name, batch",
    [("llama-gqa", 1), ("llama-gqa", 3), ("mistral-w8", 3), ("falcon-7b", 1), ("falcon-new", 3), ("falcon-rw", 3)],
)
def test_every_family(name: str, batch: int) -> None:
    """Prompts of several lengths (a graph of one length, then of any), past the budget, then more of the prompt."""
    both = pair(name, batch)
    for length in (17, 30, 13):
        both.reset()
        assert_greedy_steps_agree(both, both.prompt(length, seed=length), 40)
    assert_greedy_steps_agree(both, both.prompt(14), 3)


@pytest.mark.parametrize("dynamic", [True, False])
def test_lengths_that_vary_from_the_beginning_or_never(dynamic: bool) -> None:
    both = pair("llama-gqa", 3, dynamic=dynamic)
    for length in (3, 15, 40):  # first as many columns as rows
        both.reset()
        assert_greedy_steps_agree(both, both.prompt(length, padded=length > 3), 3)


@pytest.mark.parametrize("name, batch", [("llama-gqa", 3), ("falcon-rw", 1)])
def test_compiled_by_inductor(name: str, batch: int) -> None:
    both = pair(name, batch, "inductor", dynamic=True)
    assert_greedy_steps_agree(both, both.prompt(30), 40)


def test_eager_attention() -> None:
    torch._dynamo.reset()
    both = Pair(tiny("falcon-new", attn="eager"), 3)
    assert_greedy_steps_agree(both, both.prompt(20), 20)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-w8", "falcon-rw"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_short_prompts_without_a_mask(name: str, length: int) -> None:
    """One token is a prompt as well; a window or slopes hardly show in two."""
    both = pair(name, 3)
    assert_greedy_steps_agree(both, both.prompt(length, padded=False), 20)


def test_rows_that_do_not_take_part_in_a_step() -> None:
    both = pair("llama-gqa", 3)
    both.prompt(20)
    before = [tensor[1].clone() for tensor in both.cache.flat]
    for _ in range(15):
        assert_close(both.token(torch.full((3, 1), 7), torch.tensor([True, False, True])))
    assert all(torch.equal(tensor[1], old) for tensor, old in zip(both.cache.flat, before, strict=True))
    both.assert_same_cache()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_turn_of_calls(data: st.DataObject) -> None:
    both = MACHINE
    both.reset()
    for _ in range(data.draw(st.integers(1, 12))):
        turn = data.draw(st.sampled_from(["prompt", "token", "reset"]))
        if turn == "prompt":
            assert_close(both.prompt(data.draw(st.integers(12, 30)), data.draw(st.integers(0, 9))))
        elif turn == "token":
            active = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3).filter(any)))
            assert_close(both.token(torch.randint(2, VOCAB, (3, 1)), active))
        else:
            both.reset(data.draw(st.lists(st.integers(0, 2), min_size=1, unique=True)))
    both.assert_same_cache()


class _Later:
    """Compiled at first use."""

    made: Pair | None = None

    def __getattr__(self, name: str) -> Any:
        if _Later.made is None:
            _Later.made = Pair(tiny("mistral-w8"), 3, dynamic=True)
        return getattr(_Later.made, name)


MACHINE: Any = _Later()


def test_logits_of_all_columns_are_the_models_own() -> None:
    """The prompt itself attends in full, whatever is kept of it."""
    both = pair("llama-gqa", 1)
    given_ = prompt(1, 30)
    with torch.no_grad():
        expected = both.model(**given_, use_cache=False).logits
        torch.testing.assert_close(both.ours(**given_, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        both.cache.reset()
        last = both.ours(**given_, use_cache=False, logits_to_keep=1).logits
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-4, atol=1e-4)


def test_other_outputs_come_along() -> None:
    both = pair("llama-gqa", 1)
    given_ = prompt(1, 9)
    with torch.no_grad():
        expected = both.model(**given_, use_cache=False, output_hidden_states=True)  # first: it installs hooks
        out = both.ours(**given_, use_cache=False, output_hidden_states=True)
    assert len(out.hidden_states) == len(expected.hidden_states) == 3
    for mine, yours in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-4)


def test_outputs_that_are_views_of_positions() -> None:
    both = pair("llama-gqa", 1)

    def step(tokens: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        return both.model(tokens, position_ids=where, use_cache=False).logits, where.view(-1)

    options = {"config": CONFIG, "cache": both.cache, "lower": "eager"}
    fast = torch.compile(step, backend="zsmerge", options=options, fullgraph=True)
    with torch.no_grad():
        fast(prompt(1, 9)["input_ids"], torch.arange(9)[None])
        where = [fast(torch.tensor([[7]]), torch.tensor([[position]]))[1] for position in (9, 10, 11)]
    assert [int(position) for position in where] == [9, 10, 11]


def test_a_function_of_ones_own_around_the_model() -> None:
    """Its arguments have names of their own, and tokens come out instead of logits."""
    both = pair("llama-gqa", 1)

    def next_token(tokens: Tensor, where: Tensor) -> Tensor:
        logits: Tensor = both.model(tokens, position_ids=where, use_cache=False).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    options = {"config": CONFIG, "cache": both.cache, "lower": "eager"}
    fast = torch.compile(next_token, backend="zsmerge", options=options, fullgraph=True)
    ids = prompt(1, 21)["input_ids"]
    with torch.inference_mode():
        token = fast(ids, torch.arange(21)[None])
        expected = both.theirs.prefill(ids).argmax(-1, keepdim=True)
        for _ in range(30):
            assert torch.equal(token, expected)
            token = fast(token, both.cache.seen_tokens[:, None].clone())
            expected = both.theirs.decode(expected).argmax(-1, keepdim=True)


def test_caches_of_one_model_are_apart() -> None:
    model = tiny("llama-gqa")
    first, second = Pair(model, 1), Pair(model, 1)
    first.prompt(20)
    assert second.cache.seen_tokens.tolist() == [0]
    second.prompt(12, seed=1)
    assert_greedy_steps_agree(first, first.token(torch.tensor([[5]])), 5)


def test_a_saved_cache_goes_on_elsewhere(tmp_path: Path) -> None:
    both = pair("llama-gqa", 1)
    ours, _ = both.prompt(30)
    both.cache.save(tmp_path / "cache.safetensors")
    other = zs.compile(both.model, CONFIG, 1, backend="eager")
    other.cache.load(tmp_path / "cache.safetensors")
    both.cache.reset()
    both.cache.load(tmp_path / "cache.safetensors")
    token = ours.argmax(-1, keepdim=True)
    assert_close((both.token(token)[0], other.decode(token)))


def test_columns_cut_out_of_larger_tensors() -> None:
    """Their strides vary, which Dynamo passes along."""
    both = pair("llama-gqa", 3)
    ids, positions = prompt(3, 40)["input_ids"], torch.arange(40).expand(3, 40)
    with torch.no_grad():
        for start, stop in ((0, 15), (15, 17), (17, 18), (18, 19), (19, 30)):
            part = slice(start, stop)
            out = both.ours(ids[:, part], position_ids=positions[:, part], use_cache=False).logits[:, -1]
            assert_close((out, both.theirs.prefill(ids[:, part])))
        wider = torch.cat([ids, ids], 1)
        for at in (30, 31):
            out = both.ours(wider[:, at : at + 1], position_ids=positions[:, at : at + 1], use_cache=False).logits
            assert_close((out[:, 0], both.theirs.decode(ids[:, at : at + 1])))
