"""What Inductor makes of both graphs equals the graphs themselves, and is made once.

Compiling takes most of a minute, so each model is compiled in one test and everything is asked of it there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.codecache import PyCodeCache

from tests.models_zoo import VOCAB, prompt, tiny
from tests.states import assert_same_states
from tests.test_equivalence import assert_same_logits
from zsmerge_compile.api import compile
from zsmerge_compile.config import ZSMergeConfig
from zsmerge_compile.lower import inductor
from zsmerge_compile.ops.state import State
from zsmerge_compile.runtime.model import CompiledModel
from zsmerge_compile.testing.tolerance import HALF_FACTOR

BATCH = 3


def assert_same_caches(ours: CompiledModel, theirs: CompiledModel) -> None:
    assert torch.equal(ours.cache.seen_tokens, theirs.cache.seen_tokens)
    for one, other in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        assert_same_states(*(State(**vars(layer)) for layer in (one, other)))


def assert_equal_over_a_session(ours: CompiledModel, theirs: CompiledModel, steps: int) -> None:
    """A padded prompt past the budget, steps with rows pausing, one row refilled, and more steps.

    Tokens and `active` are columns of larger tensors, as callers cut them: no graph may insist on their strides.
    """
    generator, x, again = torch.Generator().manual_seed(0), prompt(BATCH, 30, pads=(0, 9, 29)), prompt(1, 17, seed=2)
    tokens = torch.randint(VOCAB, (BATCH, steps), generator=generator)
    awake = torch.rand(BATCH, steps, generator=generator) < 0.8
    logits = [side.prefill(x["input_ids"], x["attention_mask"]) for side in (ours, theirs)]
    assert_same_logits(*logits, "prompt")
    assert_same_caches(ours, theirs)
    for step in range(steps):
        if step == steps // 2:
            for side in (ours, theirs):
                side.reset([1])
            assert_same_logits(*(side.prefill(again["input_ids"], rows=[1]) for side in (ours, theirs)), "refill")
        token, active = tokens[:, step : step + 1], awake[:, step]
        logits = [side.decode(token, active)[active] for side in (ours, theirs)]
        assert_same_logits(*logits, f"step {step}")
    assert_same_caches(ours, theirs)


def assert_compiles_no_more(compiled: CompiledModel) -> None:
    """Prompts of many lengths, batches and rows, on empty and filled caches, and steps."""
    before = _made()
    compiled.reset()
    for length in (1, 2, 3, 7, 12, 13, 40, 133):
        for rows in ([1], [2, 0], [0, 1, 2]):
            compiled.prefill(prompt(len(rows), length + 2)["input_ids"][:, 2:], rows=rows)
            compiled.decode(torch.ones(BATCH, 1, dtype=torch.int64))
    assert _made() == before


def _made() -> tuple[int, ...]:
    """How many graphs torch has compiled in this process, in three ways of counting."""
    autograd = sum(count for name, count in counters["aot_autograd"].items() if name in ("total", "ok"))
    return len(PyCodeCache.modules), autograd, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("name", "settings", "outline"),
    [
        ("llama-gqa", {}, True),
        ("mistral-w8", dict(prefill="chunked", chunk=8), False),
        ("falcon-new", dict(merge="sequential"), True),
        ("falcon-rw", {}, False),
    ],
)
def test_inductor_equals_eager(
    name: str, settings: dict[str, Any], outline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations: list[Any] = []
    compile_graph = inductor.compile_graph

    def counted(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append(gm)
        return compile_graph(gm, inputs)

    monkeypatch.setattr(inductor, "compile_graph", counted)
    model, config = tiny(name), ZSMergeConfig(12, residual=2, **settings)
    ours = compile(model, config, BATCH, "inductor", outline=outline)
    theirs = compile(model, config, BATCH, "eager")
    expected = 6 if outline else 2
    assert len(compilations) == expected, "a prefill graph and a decode graph, or head, body and tail of each"
    assert_equal_over_a_session(ours, theirs, steps=60)
    x = prompt(BATCH, 20, pads=(0, 4, 11), seed=3)
    options = dict(attention_mask=x["attention_mask"], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(*(side.generate(x["input_ids"], **options) for side in (ours, theirs)))
    assert_compiles_no_more(ours)
    assert len(compilations) == expected


def test_half_precision_at_full_budget_is_as_close_as_transformers_is_to_itself() -> None:
    """bf16: over a prompt and 20 steps, at most twice what sdpa and eager attention of the same model differ by."""
    dtype, x = torch.bfloat16, prompt(2, 40, pads=(0, 7))
    sdpa, eager = (tiny("llama-gqa", dtype, attn) for attn in ("sdpa", "eager"))
    compiled = compile(sdpa, ZSMergeConfig(64), 2, "inductor")
    ids, mask = x["input_ids"], x["attention_mask"]
    noise = ours = 0.0
    logits = compiled.prefill(ids, mask)
    for _ in range(20):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = dict(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        with torch.no_grad():
            expected, other = (model(**given).logits[:, -1].float() for model in (sdpa, eager))
        noise, ours = max(noise, _apart(expected, other)), max(ours, _apart(expected, logits.float()))
        token = expected.argmax(-1, keepdim=True)
        logits = compiled.decode(token)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    assert 0 < ours <= HALF_FACTOR * noise


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
