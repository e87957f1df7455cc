"""CompiledModel's promises that don't concern numbers past the budget: rows, turns, chunks, memory, sharing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zsmerge_compile as zs
from tests.memory import PeakMemory
from tests.models_zoo import FAMILIES, KV_HEADS, prompt, tiny
from zsmerge_compile.testing.tolerance import LOGITS_FP32


def assert_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    spread = float(theirs.max() - theirs.min())
    assert float((ours - theirs).abs().max()) <= LOGITS_FP32 * spread


def full(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_holds_key_value_heads_only(name: str) -> None:
    """Bytes, counted by hand: Falcon's new decoder and every grouped model cache K/V heads, not query heads."""
    compiled = zs.compile(tiny(name), zs.ZSMergeConfig(budget=20), batch_size=3, backend="eager")
    window = 8 if name == "mistral-w8" else None
    slots, residual = (window or 20) + 1, 1
    per_head = slots * (2 * 8 * 4 + 3 * 4) + residual * (2 * 8 * 4 + 2 * 4)
    assert compiled.cache.nbytes == 2 * 3 * KV_HEADS[name] * per_head + 3 * 8
    assert compiled.report.cache_bytes == compiled.cache.nbytes - 3 * 8
    assert all(layer.key.shape == (3, KV_HEADS[name], slots, 8) for layer in compiled.cache.layers)


def test_bytes_stay_constant_while_decoding() -> None:
    compiled = zs.compile(tiny("llama-gqa"), zs.ZSMergeConfig(budget=6), backend="eager")
    compiled.prefill(prompt(1, 30)["input_ids"])
    pointers, size = [t.data_ptr() for t in compiled.cache.flat], compiled.cache.nbytes
    for _ in range(20):
        compiled.decode(torch.zeros(1, 1, dtype=torch.int64))
    assert [t.data_ptr() for t in compiled.cache.flat] == pointers
    assert compiled.cache.nbytes == size
    assert compiled.cache.seen_tokens.tolist() == [50]


def test_parameters_are_shared_and_the_model_is_unchanged() -> None:
    model = tiny("falcon-new")
    ids = prompt(2, 9)["input_ids"]
    before, settings = full(model, ids), repr(model.config)
    one = zs.compile(model, zs.ZSMergeConfig(budget=8), batch_size=2, backend="eager")
    other = zs.compile(model, zs.ZSMergeConfig(budget=30), batch_size=2, backend="eager")
    theirs = {p.data_ptr() for p in model.parameters()}
    for compiled in (one, other):
        for graph in (compiled.program.prefill, compiled.program.decode):
            ours = {p.data_ptr() for p in graph.parameters()}
            assert ours and ours <= theirs
    one.prefill(ids), other.prefill(ids)
    one.decode(ids[:, :1])
    assert_logits(other.decode(ids[:, :1]), full(model, torch.cat([ids, ids[:, :1]], 1)))
    assert torch.equal(full(model, ids), before)
    assert repr(model.config) == settings


def test_logits_belong_to_the_caller() -> None:
    compiled = zs.compile(tiny("llama-gqa"), zs.ZSMergeConfig(budget=8), backend="eager")
    first = compiled.prefill(prompt(1, 5)["input_ids"])
    kept = first.clone()
    second = compiled.decode(torch.ones(1, 1, dtype=torch.int64))
    compiled.decode(torch.zeros(1, 1, dtype=torch.int64))
    assert torch.equal(first, kept) and not torch.equal(second, first)


def test_one_row_is_emptied_and_refilled_while_the_others_go_on() -> None:
    """Continuous batching: every row equals a run of its own."""
    model = tiny("llama-gqa")
    compiled = zs.compile(model, zs.ZSMergeConfig(budget=12), batch_size=3, backend="eager")
    alone = zs.compile(model, zs.ZSMergeConfig(budget=12), batch_size=1, backend="eager")
    first, second = prompt(3, 20, pads=(0, 4, 9)), prompt(1, 17, seed=5)
    compiled.prefill(first["input_ids"], first["attention_mask"])
    token = torch.tensor([[3], [4], [5]])
    for _ in range(5):
        compiled.decode(token)
    compiled.reset(rows=[1])
    assert compiled.cache.seen_tokens.tolist() == [25, 0, 16]
    logits = compiled.prefill(second["input_ids"], rows=[1])
    assert_logits(logits, alone.prefill(second["input_ids"]))
    for _ in range(3):
        logits = compiled.decode(token)
    for _ in range(3):
        expected = alone.decode(token[1:2])
    assert_logits(logits[1:2], expected)
    alone.reset()
    alone.prefill(first["input_ids"][2:, 9:])
    for _ in range(8):
        expected = alone.decode(token[2:])
    assert_logits(logits[2:], expected)


def test_rows_may_come_in_any_order() -> None:
    model = tiny("llama-gqa")
    compiled = zs.compile(model, zs.ZSMergeConfig(budget=30), batch_size=3, backend="eager")
    ids = prompt(2, 8)["input_ids"]
    assert_logits(compiled.prefill(ids, rows=[2, 0]), full(model, ids))
    more = prompt(2, 4, seed=1)["input_ids"]
    assert_logits(compiled.prefill(more, rows=torch.tensor([0, 2])), full(model, torch.cat([ids.flip(0), more], 1)))
    assert compiled.cache.seen_tokens.tolist() == [12, 0, 12]


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_chunked_prefill_at_full_budget_is_exact(chunk: int) -> None:
    model = tiny("mistral-w8")
    config = zs.ZSMergeConfig(budget=64, prefill="chunked", chunk=chunk)
    compiled = zs.compile(model, config, batch_size=2, backend="eager")
    given = prompt(2, 20, pads=(0, 6))
    assert_logits(
        compiled.prefill(given["input_ids"], given["attention_mask"]),
        model(**given, use_cache=False).logits[:, -1].detach(),
    )


@pytest.mark.parametrize("prefill", ["full", "chunked"])
@pytest.mark.parametrize("turns", [(1, 1, 5), (3, 1, 20, 2)])
def test_turns_of_any_length_continue_the_cache(prefill: str, turns: tuple[int, ...]) -> None:
    """A one-token prompt, prompts shorter than the budget, and longer ones: all are one text at full budget."""
    model = tiny("falcon-rw")
    compiled = zs.compile(model, zs.ZSMergeConfig(budget=60, prefill=prefill, chunk=4), backend="eager")
    ids = prompt(1, sum(turns) + len(turns))["input_ids"]
    at = 0
    for length in turns:
        logits = compiled.prefill(ids[:, at : at + length])
        assert_logits(logits, full(model, ids[:, : at + length]))
        at += length
        logits = compiled.decode(ids[:, at : at + 1])
        at += 1
        assert_logits(logits, full(model, ids[:, :at]))


def test_chunked_prefill_is_untouched_by_left_padding() -> None:
    config = zs.ZSMergeConfig(budget=8, prefill="chunked", chunk=5)
    model = tiny("llama-gqa")
    padded = zs.compile(model, config, batch_size=2, backend="eager")
    alone = zs.compile(model, config, batch_size=1, backend="eager")
    given = prompt(2, 33, pads=(0, 13))
    logits = padded.prefill(given["input_ids"], given["attention_mask"])
    assert_logits(logits[1:], alone.prefill(given["input_ids"][1:, 13:]))


@pytest.mark.parametrize("merge", ["segment", "sequential"])
def test_prefill_holds_one_layer_of_keys_and_values_at_a_time(merge: str) -> None:
    """8 layers peak no higher than 2, but for 5% (added weights and cache are allocated before)."""
    peaks = []
    for layers in (2, 8):
        model = tiny("llama-gqa", num_hidden_layers=layers, hidden_size=64)
        compiled = zs.compile(model, zs.ZSMergeConfig(budget=16, merge=merge), backend="eager")
        ids = prompt(1, 700)["input_ids"]
        with PeakMemory() as memory:
            compiled.prefill(ids)
        peaks.append(memory.peak)
    assert peaks[1] <= 1.05 * peaks[0]


@pytest.mark.parametrize("pads", [0, 100])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-w8", "falcon-rw"])
def test_prefill_makes_no_square_buffer(name: str, pads: int) -> None:
    """No T x T mask or scores, no heads x queries x T, no logits but the last: nothing above a few blocks x T."""
    columns, budget = 3000, 16
    model = tiny(name)
    compiled = zs.compile(model, zs.ZSMergeConfig(budget=budget), batch_size=2, backend="eager")
    given = prompt(2, columns, pads=(0, pads))
    with PeakMemory() as memory:
        compiled.prefill(given["input_ids"], given["attention_mask"])
    block = 1024 * (columns + budget + 1) * 4  # BLOCK_ROWS rows of fp32 attention
    assert memory.largest <= block
    assert memory.largest < columns * columns * 4


def test_budgets_per_layer_are_kept_apart() -> None:
    model = tiny("llama-gqa")
    compiled = zs.compile(model, zs.ZSMergeConfig(budget=[6, 30]), backend="eager")
    assert [layer.key.shape[2] for layer in compiled.cache.layers] == [7, 31]
    assert [(x.proximity, x.context, x.residual) for x in compiled.report.layouts] == [(3, 2, 1), (15, 14, 1)]
    compiled.prefill(prompt(1, 25)["input_ids"])
    assert [int((layer.weight > 0).sum(-1).max()) for layer in compiled.cache.layers] == [6, 25]


def test_a_budget_may_be_a_share_of_a_length() -> None:
    assert zs.ZSMergeConfig.from_ratio(0.05, length=40_960, alpha=1.0) == zs.ZSMergeConfig(budget=2048, alpha=1.0)
    assert zs.ZSMergeConfig.from_ratio(0.05, length=10).budget == 3
