"""Every refusal of SPEC section 3: one clear sentence, and a cache that is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import zsmerge_compile as zs
from tests.models_zoo import VOCAB, tiny
from zsmerge_compile.errors import CacheStateError, ConfigError, InputError, MissingBackendError, UnsupportedModelError

BATCH, LIMIT = 2, 40


@pytest.fixture(scope="module")
def shared() -> Any:
    model = tiny("llama-gqa", max_position_embeddings=LIMIT)
    return zs.compile(model, zs.ZSMergeConfig(budget=8), batch_size=BATCH, backend="eager")


@pytest.fixture
def compiled(shared: Any) -> Iterator[Any]:
    """With 12 tokens in each row."""
    shared.reset()
    shared.prefill(ids(BATCH, 12))
    yield shared


def ids(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows * columns).reshape(rows, columns) % VOCAB


def snapshot(compiled: Any) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in (*compiled.cache.flat, compiled.cache.seen_tokens)]


def padded(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


CALLS: dict[str, tuple[Callable[[Any], object], str]] = {
    "batch other than compiled for": (
        lambda c: c.prefill(ids(3, 4)),
        "batch of input_ids must be 2, as compiled for, got 3",
    ),
    "empty prompt": (lambda c: c.prefill(ids(2, 0)), "prompt must be at least one token long"),
    "a row that is all padding": (
        lambda c: c.prefill(ids(2, 3), padded([1, 1, 1], [0, 0, 0])),
        "every row of attention_mask must be at least one token, got only padding in rows \\[1\\]",
    ),
    "right padding": (lambda c: c.prefill(ids(2, 3), padded([1, 1, 0], [1, 1, 1])), "padding must be on the left"),
    "a hole in the mask": (lambda c: c.prefill(ids(2, 3), padded([1, 0, 1], [1, 1, 1])), "padding must be on the left"),
    "mask of another shape": (
        lambda c: c.prefill(ids(2, 3), torch.ones(2, 4)),
        "attention_mask must be of input_ids' shape",
    ),
    "mask with other values": (
        lambda c: c.prefill(ids(2, 2), padded([1, 2], [1, 1])),
        "attention_mask must be 0 at padding",
    ),
    "float ids": (lambda c: c.prefill(ids(2, 3).float()), "input_ids must be int64 or int32, got torch.float32"),
    "ids that are a list": (lambda c: c.prefill([[1, 2]]), "input_ids must be a tensor of shape"),
    "flat ids": (lambda c: c.prefill(ids(2, 3)[0]), "input_ids must be of shape \\[batch, length\\], got \\[3\\]"),
    "ids on another device": (lambda c: c.prefill(ids(2, 3).to("meta")), "input_ids must be on cpu, got meta"),
    "unknown token": (lambda c: c.prefill(ids(2, 3) + VOCAB), f"input_ids must be in 0 .. {VOCAB - 1}, got"),
    "negative token": (lambda c: c.decode(ids(2, 1) - 3), f"token_ids must be in 0 .. {VOCAB - 1}, got -3"),
    "past the last position": (lambda c: c.prefill(ids(2, LIMIT - 11)), f"tokens seen must be at most {LIMIT}"),
    "rows out of range": (lambda c: c.prefill(ids(1, 3), rows=[2]), "rows must be distinct row numbers in 0 .. 1"),
    "rows twice": (lambda c: c.prefill(ids(2, 3), rows=[1, 1]), "rows must be distinct"),
    "no rows": (lambda c: c.prefill(ids(0, 3), rows=[]), "rows must be distinct"),
    "more prompts than rows": (
        lambda c: c.prefill(ids(2, 3), rows=[1]),
        "input_ids' batch must be len\\(rows\\), 1, got 2",
    ),
    "reset of rows out of range": (lambda c: c.reset(rows=[-1]), "rows must be distinct row numbers"),
    "decode of two tokens": (lambda c: c.decode(ids(2, 2)), "token_ids must be of shape \\[2, 1\\]"),
    "decode of one row": (
        lambda c: c.decode(ids(1, 1)),
        "token_ids must be of shape \\[2, 1\\], as compiled for, got \\[1, 1\\]",
    ),
    "active as numbers": (
        lambda c: c.decode(ids(2, 1), torch.ones(2)),
        "active must be a bool tensor of shape \\[2\\]",
    ),
    "active of one row": (
        lambda c: c.decode(ids(2, 1), torch.ones(1, dtype=torch.bool)),
        "active must be a bool tensor",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_refused_call_leaves_the_cache_as_it_was(compiled: Any, name: str) -> None:
    call, message = CALLS[name]
    before, logits = snapshot(compiled), None
    with pytest.raises(InputError, match=message):
        call(compiled)
    for was, now in zip(before, snapshot(compiled), strict=True):
        assert torch.equal(was, now)
    logits = compiled.decode(ids(2, 1))
    assert logits.shape == (BATCH, VOCAB)


def test_decode_stops_at_the_last_position(compiled: Any) -> None:
    compiled.reset()
    compiled.prefill(ids(2, LIMIT - 1))
    compiled.decode(ids(2, 1))
    with pytest.raises(
        InputError, match=f"tokens seen must be at most {LIMIT}, the model's positions or .*, got {LIMIT + 1}"
    ):
        compiled.decode(ids(2, 1))
    compiled.reset(rows=[0])
    compiled.decode(ids(2, 1), torch.tensor([True, False]))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no budgets": (dict(budget=[]), "budget list must be one count per layer, got"),
    "no room for the residual": (dict(budget=8, proximity=8), "proximity \\+ residual must be at most the budget of 8"),
    "small budget": (dict(budget=2), "budget must be an integer of at least 3, got 2"),
    "budget smaller than its parts": (
        dict(budget=8, proximity=6, residual=3),
        "proximity \\+ residual must be at most",
    ),
    "proximity above budget": (dict(budget=8, proximity=9), "proximity must be at most the budget of 8 slots, got 9"),
    "no ring": (dict(budget=8, proximity=0), "proximity must be a count above 0"),
    "share above one": (dict(budget=8, proximity=1.5), "proximity must be a count above 0, or a share"),
    "negative residual": (dict(budget=8, residual=-1), "residual must be a count of at least 0"),
    "alpha": (dict(budget=8, alpha=1.2), "alpha must be a number in \\[0, 1\\], got 1.2"),
    "decay": (dict(budget=8, decay=float("nan")), "decay must be a number in \\[0, 1\\], got nan"),
    "prefill": (dict(budget=8, prefill="half"), "prefill must be one of full, chunked, got 'half'"),
    "merge": (dict(budget=8, merge="all"), "merge must be one of segment, sequential, got 'all'"),
    "chunk": (dict(budget=8, chunk=0), "chunk must be an integer of at least 1, got 0"),
    "budget as text": (dict(budget="8"), "budget must be an integer of at least 3, got '8'"),
    "budget as bool": (dict(budget=True), "budget must be an integer of at least 3, got True"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_refused_config(name: str) -> None:
    fields, message = CONFIGS[name]
    with pytest.raises(ConfigError, match=message):
        zs.ZSMergeConfig(**fields)


def test_refused_compile_arguments() -> None:
    model, config = tiny("llama-gqa"), zs.ZSMergeConfig(budget=8)
    with pytest.raises(ConfigError, match="budget list must be one count per layer \\(2\\), got '3 counts'"):
        zs.compile(model, zs.ZSMergeConfig(budget=[8, 8, 8]))
    with pytest.raises(ConfigError, match="batch_size must be an integer of at least 1, got 0"):
        zs.compile(model, config, batch_size=0)
    with pytest.raises(ConfigError, match="config must be a ZSMergeConfig or a policy, got int"):
        zs.compile(model, 8)  # type: ignore[arg-type]
    with pytest.raises(MissingBackendError, match="backend must be one of eager, inductor"):
        zs.compile(model, config, backend="cuda")
    with pytest.raises(MissingBackendError, match="tensorrt"):
        zs.compile(model, config, backend="tensorrt")
    with pytest.raises(UnsupportedModelError, match="model class must be one of FalconForCausalLM"):
        zs.compile(nn.Linear(2, 2).eval(), config)
    with pytest.raises(UnsupportedModelError, match="eval mode"):
        zs.compile(tiny("llama-gqa").train(), config)


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_a_call_that_breaks_midway_marks_its_rows_until_reset(
    compiled: Any, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(compiled, "prefill_graph", broken)
    with pytest.raises(error):
        compiled.prefill(ids(1, 4), rows=[1])
    monkeypatch.undo()
    for call in (lambda: compiled.decode(ids(2, 1)), lambda: compiled.prefill(ids(1, 4), rows=[1])):
        with pytest.raises(CacheStateError, match="cache rows \\[1\\] must be valid.*reset\\(rows=\\[1\\]\\)"):
            call()
    compiled.decode(ids(2, 1), torch.tensor([True, False]))  # the other row goes on
    compiled.reset(rows=[1])
    compiled.prefill(ids(1, 4), rows=[1])
    assert compiled.cache.seen_tokens.tolist() == [13, 4]


def test_nan_breaks_only_the_rows_it_is_in() -> None:
    model = tiny("llama-gqa")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    compiled = zs.compile(model, zs.ZSMergeConfig(budget=8), batch_size=3, backend="eager", check_nan=True)
    compiled.prefill(torch.tensor([[1, 2], [1, 3]]), rows=[2, 0])
    with pytest.raises(CacheStateError, match="NaN in rows \\[1\\]; reset"):
        compiled.prefill(torch.tensor([[7, 7]]), rows=[1])
    assert compiled.cache.broken_rows() == [1]
    active = torch.tensor([True, False, True])
    compiled.decode(torch.tensor([[1], [1], [1]]), active)
    with pytest.raises(CacheStateError, match="NaN in rows \\[2\\]"):
        compiled.decode(torch.tensor([[1], [1], [7]]), active)
    assert compiled.cache.broken_rows() == [1, 2]


def test_generate_stops_at_the_last_position_and_refuses_lists(compiled: Any) -> None:
    out = compiled.generate(ids(2, 30) + 1, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert out.shape == (2, LIMIT + 1)  # the last token needs no position: it is not fed
    assert compiled.cache.seen_tokens.tolist() == [LIMIT, LIMIT]
    with pytest.raises(InputError, match="input_ids must be a tensor"):
        compiled.generate([[1, 2], [3, 4]])
    with pytest.raises(InputError, match="attention_mask must be a tensor"):
        compiled.generate(ids(2, 3), attention_mask=[[1] * 3] * 2)


def test_a_model_compiled_in_inference_mode_works_outside() -> None:
    with torch.inference_mode():
        compiled = zs.compile(tiny("llama-gqa"), zs.ZSMergeConfig(budget=8), backend="eager")
        compiled.prefill(ids(1, 12))
    compiled.decode(ids(1, 1))
    assert compiled.cache.seen_tokens.tolist() == [13]


def test_nan_in_logits_is_found_where_asked_for() -> None:
    model = tiny("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    silent = zs.compile(model, zs.ZSMergeConfig(budget=8), backend="eager")
    assert silent.prefill(ids(1, 4)).isnan().any()
    checked = zs.compile(model, zs.ZSMergeConfig(budget=8), backend="eager", check_nan=True)
    with pytest.raises(CacheStateError, match="logits must be numbers, got NaN in rows \\[0\\]"):
        checked.prefill(ids(1, 4))
    with pytest.raises(CacheStateError, match="must be valid"):
        checked.decode(ids(1, 1))
