"""The driver of a TensorRT step over a stand-in engine is the in-place step: state by state, in all a runner does.

The stand-in knows addresses only, so a buffer that is swapped, stale or bound too early shows as another state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zsmerge_compile as zs
from tests.models_zoo import VOCAB, prompt, tiny
from tests.runtime.tape import record
from tests.tensorrt import standin
from tests.tensorrt.conftest import Tools
from zsmerge_compile.lower import tensorrt, tensorrt_build
from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.lower.standard import graphs
from zsmerge_compile.runtime.bound_step import BoundStep
from zsmerge_compile.runtime.model import CompiledModel

BATCH = 3
CASES = [("llama-gqa", 2), ("mistral-w8", 0), ("falcon-new", 2), ("falcon-rw", 2)]


@cache
def eager(name: str, residual: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    config = zs.ZSMergeConfig(12, residual=residual)
    return zs.compile(tiny(name, dtype), config, batch_size=BATCH, backend="eager")


def model(base: Any, decode: Callable[..., Tensor]) -> CompiledModel:
    """The base's prompts with another step, over a cache of its own."""
    lowered = Lowered(base.prefill_graph, decode, base.report.kernels, base.report.parts)
    return CompiledModel(base.model, base.program, lowered, base.report, None, False)


def in_place(base: Any) -> CompiledModel:
    """By the step in aten nodes that writes its state in place."""
    made = graphs(base.program)
    weights = [made.weights[name] for name in made.decode.weights]
    return model(base, lambda *given: made.decode.module(*given, *weights))


def bound(base: Any, recorder: Any = None) -> CompiledModel:
    """By our driver: build, wiring, plan and buffers, with the stand-in for TensorRT."""
    step = tensorrt.one_engine(tensorrt_build.whole(tensorrt_build.compiled_step(base.program)), base.interface)
    return model(base, BoundStep(step.engine, base.interface, recorder))


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.cache.seen_tokens, theirs.cache.seen_tokens)
    for name, one, other in zip(ours.interface.state_names, ours.cache.flat, theirs.cache.flat, strict=True):
        assert torch.equal(one, other), name


def session(ours: Any, theirs: Any, steps: int = 40) -> None:
    """A padded prompt past the budget, steps with rows pausing, a row refilled, more prompt; states all along."""
    generator, x = torch.Generator().manual_seed(0), prompt(BATCH, 30, pads=(0, 9, 29))
    tokens = torch.randint(VOCAB, (BATCH, steps), generator=generator)
    awake = torch.rand(BATCH, steps, generator=generator) < 0.8
    for side in (ours, theirs):
        side.reset()
        side.prefill(x["input_ids"], x["attention_mask"])
    for step in range(steps):
        if step == steps // 2:
            for side in (ours, theirs):
                side.reset([1])
                side.prefill(prompt(1, 17, seed=2)["input_ids"], rows=[1])
                side.prefill(prompt(2, 3, seed=5)["input_ids"], rows=[2, 0])
        active = awake[:, step]
        mine, yours = (side.decode(tokens[:, step : step + 1], active) for side in (ours, theirs))
        assert torch.equal(mine[active], yours[active]), step
        assert_same(ours, theirs)


@pytest.mark.parametrize("recorder", [None, record], ids=["called", "recorded"])
@pytest.mark.parametrize(("name", "residual"), CASES)
def test_a_bound_step_is_the_step_in_place(name: str, residual: int, recorder: Any, tools: Tools) -> None:
    base = eager(name, residual)
    ours, theirs = bound(base, recorder), in_place(base)
    session(ours, theirs)
    x = prompt(BATCH, 20, pads=(0, 4, 11), seed=3)
    options = dict(attention_mask=x["attention_mask"], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(*(side.generate(x["input_ids"], **options) for side in (ours, theirs)))
    assert_same(ours, theirs)


def test_half_precision_keeps_scores_and_weights_in_fp32(tools: Tools) -> None:
    base = eager("llama-gqa", dtype=torch.bfloat16)
    session(bound(base), in_place(base), steps=20)
    (made,) = tools.trt.made.values()
    names = base.interface.state_names
    dtypes = dict(zip(names, [tensor.dtype for tensor in list(made.outputs.values())[1:]], strict=True))
    assert {dtype for name, dtype in dtypes.items() if name.endswith(("weight", "score"))} == {torch.float32}
    program = tensorrt_build.step_program(*tensorrt_build.step_graph(base.program))
    softmax = [node for node in program.graph.nodes if "softmax" in str(node.target)]
    assert [node.meta["val"].dtype for node in softmax] == [torch.float32] * 2


def test_tensors_stay_the_same_objects_and_move(tools: Tools) -> None:
    ours = bound(eager("llama-gqa"))
    key, logits = ours.cache.layers[0].key, ours.prefill(prompt(BATCH, 5)["input_ids"])
    places = []
    for _ in range(4):
        logits = ours.decode(logits.argmax(-1, keepdim=True))
        places.append(key.data_ptr())
    assert key is ours.cache.layers[0].key and places[0] == places[2] != places[1] == places[3]
    kept = logits.clone()
    ours.decode(logits.argmax(-1, keepdim=True))
    assert torch.equal(logits, kept), "logits are the caller's own"


def test_both_sets_of_tensors_are_counted(tools: Tools) -> None:
    base = eager("llama-gqa")
    ours = bound(base)
    assert ours.cache.nbytes == 2 * base.cache.nbytes - ours.cache.seen_tokens.nbytes


def test_a_saved_cache_goes_over(tools: Tools, tmp_path: Path) -> None:
    base = eager("llama-gqa")
    ours, theirs = bound(base), in_place(base)
    session(ours, theirs, steps=5)
    ours.cache.save(tmp_path / "rows")
    for side in (ours, theirs):
        side.decode(torch.ones(BATCH, 1, dtype=torch.int64))
        side.cache.load(tmp_path / "rows")
        side.decode(torch.full((BATCH, 1), 7))
    assert_same(ours, theirs)


def test_both_ways_are_recorded_with_the_runner_and_have_contexts_of_their_own(tools: Tools) -> None:
    base = eager("llama-gqa")
    ours = bound(base, record)
    step: Any = ours.decode_graph
    before = list(step._recordings.values())
    assert len(before) == 2 and before[0].context is not before[1].context
    ours.prefill(prompt(BATCH, 30)["input_ids"])
    for _ in range(5):
        ours.decode(torch.full((BATCH, 1), 7))
    assert list(step._recordings.values()) == before


def test_after_an_interrupted_swap_a_reset_is_enough(tools: Tools) -> None:
    """Ctrl-C between the two assignments leaves a tensor of the cache and a spare one over one memory."""
    base = eager("llama-gqa")
    ours, theirs = bound(base), in_place(base)
    session(ours, theirs, steps=3)
    ours.cache.flat[4].data = ours.decode_graph._spare[4].data  # type: ignore[attr-defined]
    session(ours, theirs, steps=9)


def test_two_caches_may_share_a_step(tools: Tools) -> None:
    base = eager("llama-gqa")
    first = bound(base, record)
    second = model(base, first.decode_graph)
    theirs = in_place(base)
    session(first, theirs, steps=3)
    session(second, theirs, steps=6)
    session(first, theirs, steps=6)
    assert len(first.decode_graph._recordings) <= 8  # type: ignore[attr-defined]


class NeverSwaps(BoundStep):
    """The new state stays in the second set."""

    def __call__(self, *given: Tensor) -> Tensor:
        copies = [tensor.detach() for tensor in given[3:]]  # other objects over the same memory
        logits = super().__call__(*given[:3], *copies)
        for copy, spare in zip(copies, self._spare.values(), strict=True):
            copy.data, spare.data = spare.data, copy.data
        return logits


class ForgetsOne(BoundStep):
    """Swaps all but one tensor: position, of the last layer."""

    def __call__(self, *given: Tensor) -> Tensor:
        logits = super().__call__(*given)
        live, spare = given[3 + 9 + 4], self._spare[9 + 4]
        live.data, spare.data = spare.data, live.data
        return logits


class BindsOnce(BoundStep):
    """Goes on with the first recording, whatever the tensors' memory."""

    def _recorded(self, record: Any, seen: Tensor, live: Any) -> Any:
        for kept in self._recordings.values():
            return kept.recording
        return super()._recorded(record, seen, live)


@pytest.mark.parametrize(
    ("wrong", "recorder"), [(NeverSwaps, None), (ForgetsOne, None), (ForgetsOne, record), (BindsOnce, record)]
)
def test_a_wrong_driver_would_be_caught(wrong: type[BoundStep], recorder: Any, tools: Tools) -> None:
    base = eager("llama-gqa")
    ours = bound(base)
    broken = model(base, wrong(ours.decode_graph.engine, base.interface, recorder))  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        session(broken, in_place(base), steps=12)


def test_what_the_engine_writes_in_place_stays(tools: Tools) -> None:
    """An engine may say that an output lies in its input's memory: those tensors have no second set and do not move."""
    base = eager("llama-gqa")
    compiled = tensorrt_build.compiled_step(base.program)
    built = tensorrt_build.whole(compiled)
    made = tools.trt.made[built.content]
    pairs = dict(zip(built.binding.outputs[1:3], built.binding.inputs[3:5], strict=True))
    made.aliased.update({out: given for out, given in pairs.items() if given})
    ours, theirs = model(base, tensorrt.one_engine(built, base.interface)), in_place(base)
    places = [tensor.data_ptr() for tensor in ours.cache.flat[:3]]
    session(ours, theirs, steps=9)
    now = [tensor.data_ptr() for tensor in ours.cache.flat[:3]]
    assert now[:2] == places[:2] and now[2] != places[2]
    held = sum(tensor.nbytes for tensor in ours.cache.flat)
    assert ours.cache.nbytes == 2 * held + ours.cache.seen_tokens.nbytes - sum(t.nbytes for t in ours.cache.flat[:2])


def test_several_segments_are_called_as_a_module(tools: Tools) -> None:
    base = eager("llama-gqa")
    pieces = tensorrt.Pieces(tensorrt_build.compiled_step(base.program))
    session(model(base, BoundStep(pieces, base.interface)), in_place(base), steps=9)


def test_an_engine_over_its_own_input_is_refused_by_the_stand_in() -> None:
    x = torch.zeros(4)
    context = standin.Context(standin.Made(lambda x: [x + 1], {"x": x}, {"y": x}))
    context.set_tensor_address("x", x.data_ptr())
    context.set_tensor_address("y", x.data_ptr())
    with pytest.raises(AssertionError, match="y lies over x"):
        context.execute_async_v3(0)
