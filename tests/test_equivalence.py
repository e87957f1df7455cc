"""End to end through `compile`: the untouched model at full budget, and past it ZSMerge on lists, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models_zoo import FAMILIES, VOCAB, prompt, tiny
from tests.states import assert_same_states
from zsmerge_compile.api import compile
from zsmerge_compile.config import ZSMergeConfig
from zsmerge_compile.ops.state import State
from zsmerge_compile.runtime.model import CompiledModel
from zsmerge_compile.testing.oracle import Oracle
from zsmerge_compile.testing.tolerance import DECISION, HALF_FACTOR, HALF_FLOOR, LOGITS_FP32

ATTENTION = ("sdpa", "eager")
PROMPTS: tuple[tuple[int, tuple[int, ...]], ...] = (  # columns, padding of each row
    (1, (0,)),
    (1, (0, 0, 0)),
    (9, (3, 0, 8)),
    (23, (0, 22)),
    (40, (0, 17, 39)),
)
model_of = cache(tiny)


def untouched(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of all columns [b, T, vocab]."""
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    return logits


def assert_same_logits(ours: Tensor, theirs: Tensor, what: str, share: float = LOGITS_FP32) -> None:
    """Row by row, as a share of the row's range."""
    error = (ours.double() - theirs.double()).abs().amax(-1) / (theirs.amax(-1) - theirs.amin(-1))
    assert bool((error <= share).all()), f"{what}: {error.tolist()} of the range"


def feed(compiled: CompiledModel, rows: Sequence[int], token: Tensor) -> Tensor:
    """One token [b, 1] for each of `rows`, the others inactive: logits [b, vocab]."""
    ids, active = torch.zeros(compiled.batch_size, 1, dtype=torch.int64), torch.zeros(compiled.batch_size).bool()
    ids[list(rows)], active[list(rows)] = token, True
    return compiled.decode(ids, active)[list(rows)]


# --- full budget


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("name", FAMILIES)
def test_full_budget_is_the_untouched_model(name: str, attn: str) -> None:
    """Batches of one to three, in any rows; eager attention takes its prompts in chunks. Greedy, 6 tokens each."""
    model = model_of(name, attn=attn)
    chunks: dict[str, Any] = {} if attn == "sdpa" else dict(prefill="chunked", chunk=7)
    compiled = compile(model, ZSMergeConfig(46, **chunks), batch_size=3, backend="eager")
    for number, (columns, pads) in enumerate(PROMPTS):
        x, rows = prompt(len(pads), columns, seed=number, pads=pads), [2, 0, 1][: len(pads)]
        ids, mask = x["input_ids"], x["attention_mask"]
        compiled.reset()
        logits = compiled.prefill(ids, mask, rows=rows)
        for step in range(6):
            expected = untouched(model, ids, mask)[:, -1]
            assert_same_logits(logits, expected, f"{columns} columns, step {step}")
            token = expected.argmax(-1, keepdim=True)
            assert torch.equal(logits.argmax(-1, keepdim=True), token)
            ids, mask = torch.cat([ids, token], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
            logits = feed(compiled, rows, token)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_budget_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """Against what transformers' own two spellings differ by on the same tokens.

    Falcon's eager attention adds ALiBi twice, so that family is measured by its distance from fp32.
    """
    model = model_of(name, dtype)
    other = tiny(name, dtype).float() if name == "falcon-rw" else model_of(name, dtype, "eager")
    compiled = compile(model, ZSMergeConfig(46), batch_size=3, backend="eager")
    x = prompt(3, 46, pads=(0, 5, 33))
    ids, mask = x["input_ids"], x["attention_mask"]
    expected = untouched(model, ids, mask)
    assert expected.dtype == dtype
    ours = [compiled.prefill(ids[:, :34], mask[:, :34])] + [compiled.decode(ids[:, t : t + 1]) for t in range(34, 46)]
    noise = float((untouched(other, ids, mask).float() - expected.float()).abs()[mask.bool()].max())
    floor = HALF_FLOOR * torch.finfo(dtype).eps * float(expected.abs().max())
    for step, logits in enumerate(ours):
        error = float((logits.float() - expected[:, 33 + step].float()).abs().max())
        assert error <= max(HALF_FACTOR * noise, floor), f"step {step}: {error} against {noise}"


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-w8", "falcon-rw"])
def test_a_batch_of_one(name: str) -> None:
    model = model_of(name)
    compiled = compile(model, ZSMergeConfig(32), backend="eager")
    x = prompt(1, 26, pads=(6,))
    ids, mask = x["input_ids"], x["attention_mask"]
    logits, expected = compiled.prefill(ids[:, :11], mask[:, :11]), untouched(model, ids, mask)
    for t in range(10, 26):
        assert_same_logits(logits, expected[:, t], f"column {t}")
        logits = compiled.decode(ids[:, t + 1 : t + 2]) if t < 25 else logits


@pytest.mark.parametrize("prefill", ["full", "chunked"])
def test_a_window_no_larger_than_the_budget_is_the_windowed_model_at_any_length(prefill: str) -> None:
    model = model_of("mistral-w8")
    compiled = compile(model, ZSMergeConfig(24, prefill=prefill, chunk=5), batch_size=2, backend="eager")
    assert {layer.key.shape[2] for layer in compiled.cache.layers} == {9}
    x = prompt(2, 150, pads=(0, 20))
    ids, mask = x["input_ids"], x["attention_mask"]
    logits, expected = compiled.prefill(ids[:, :61], mask[:, :61]), untouched(model, ids, mask)
    for t in range(60, 150):
        assert_same_logits(logits, expected[:, t], f"column {t}")
        logits = compiled.decode(ids[:, t + 1 : t + 2]) if t < 149 else logits


# --- past the budget

STEPS = 300
PAST: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # id -> family, config fields, cache settings
    **{name: (name, {}, {}) for name in FAMILIES},
    "mistral-w40": ("mistral", dict(sliding_window=40), {}),
    "mistral-w24": ("mistral", dict(sliding_window=24), dict(merge="sequential")),
    "llama-chunked": ("llama-gqa", {}, dict(prefill="chunked", chunk=9)),
    "llama-sequential": ("llama-gqa", {}, dict(merge="sequential")),
    "llama-eviction": ("llama-gqa", {}, dict(residual=0, decay=1.0)),
    "llama-alpha": ("llama-gqa", dict(num_hidden_layers=3), dict(alpha=1.0, decay=0.9)),
    "falcon-rw-eager": ("falcon-rw", dict(attn="eager"), {}),
    "falcon-new-eager": ("falcon-new", dict(attn="eager"), dict(merge="sequential")),
    "mistral-w40-eager": ("mistral", dict(sliding_window=40, attn="eager"), dict(prefill="chunked", chunk=16)),
}
SEEDS = dict.fromkeys(PAST, 0) | {"falcon-rw-eager": 2}  # of tokens that bring no decision too close to call


@pytest.mark.parametrize("case", PAST)
def test_past_the_budget_is_zsmerge_on_lists(case: str) -> None:
    """Three rows, padded on the left, now and then pausing; row 1 starts over in the middle."""
    name, fields, settings = PAST[case]
    model = tiny(name, **fields)
    config = ZSMergeConfig(24, **{"proximity": 9, "residual": 4, **settings})
    compiled = compile(model, config, batch_size=3, backend="eager")
    windows = compiled.program.spec.windows
    splits = [tuple(config.split(24, window)) for window in windows]
    shared = dict(alpha=config.alpha, decay=config.decay, merge=config.merge)
    oracle = Oracle(model, splits, windows, batch=3, **shared)  # type: ignore[arg-type]
    chunk = config.chunk if config.prefill == "chunked" else None
    generator = torch.Generator().manual_seed(SEEDS[case])
    first, again = prompt(3, 37, SEEDS[case], pads=(0, 11, 36)), prompt(1, 30, SEEDS[case] + 1, pads=(3,))
    ours = compiled.prefill(first["input_ids"], first["attention_mask"])
    theirs = oracle.prefill(first["input_ids"], first["attention_mask"], chunk)
    assert_same_logits(ours, theirs, "prompt")
    for step in range(STEPS):
        if step == STEPS // 2:
            closest = oracle.margin
            compiled.reset([1])
            oracle.reset([1])
            ours = compiled.prefill(again["input_ids"], again["attention_mask"], rows=[1])
            theirs = oracle.prefill(again["input_ids"], again["attention_mask"], chunk, rows=[1])
            assert_same_logits(ours, theirs, "second prompt")
        active = torch.rand(3, generator=generator) < 0.9
        token = torch.randint(2, VOCAB, (3, 1), generator=generator)  # the key of 0, the pad, is zero: a true tie
        ours, theirs = compiled.decode(token, active), oracle.decode(token, active)
        assert_same_logits(ours[active], theirs[active], f"step {step}, margin {oracle.margin:.1e}")
    assert compiled.cache.seen_tokens.tolist() == oracle.seen
    assert min(closest, oracle.margin) > DECISION, "choose another seed: nothing is proved after a near tie"


@pytest.mark.parametrize("merge", ["segment", "sequential"])
def test_one_chunk_as_large_as_the_prompt_is_full(merge: str) -> None:
    x = prompt(2, 50, pads=(0, 13))
    both = []
    for settings in ({}, dict(prefill="chunked", chunk=64)):
        config = ZSMergeConfig(12, residual=3, merge=merge, **settings)  # type: ignore[arg-type]
        compiled = compile(model_of("falcon-new"), config, batch_size=2, backend="eager")
        both.append((compiled.prefill(x["input_ids"], x["attention_mask"]), compiled.cache))
    assert_same_logits(both[0][0], both[1][0], merge)
    for one, other in zip(both[0][1].layers, both[1][1].layers, strict=True):
        assert_same_states(*(State(**vars(layer)) for layer in (one, other)))
