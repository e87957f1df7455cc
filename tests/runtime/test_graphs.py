"""A recorded step is the step: the same logits and cache, over buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zsmerge_compile as zs
from tests.models_zoo import VOCAB, prompt, tiny
from tests.runtime.tape import record
from tests.runtime.turns import padded, turn
from zsmerge_compile.errors import CacheStateError, InputError
from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.runtime.graphs import DirectStep, RecordedStep, Recording, recorder_for
from zsmerge_compile.runtime.model import CompiledModel

BATCH = 3


@pytest.fixture(scope="module", params=["llama-gqa", "mistral-w8", "falcon-rw"])
def direct(request: pytest.FixtureRequest) -> Any:
    return zs.compile(tiny(request.param), zs.ZSMergeConfig(budget=7), batch_size=BATCH, backend="eager")


@pytest.fixture(scope="module")
def recorded(direct: Any) -> Any:
    return again(direct, record)


def again(direct: Any, recorder: Any, check_nan: bool = False) -> CompiledModel:
    """The same program with a cache of its own, its step recorded."""
    lowered = Lowered(direct.prefill_graph, direct.decode_graph, direct.report.kernels, direct.report.parts)
    return CompiledModel(direct.model, direct.program, lowered, direct.report, None, check_nan, recorder)


def everything(compiled: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in (*compiled.cache.flat, compiled.cache.seen_tokens)]


def assert_same(ours: Any, theirs: Any) -> None:
    for one, other in zip(everything(ours), everything(theirs), strict=True):
        assert torch.equal(one, other)


def test_the_report_says_how_a_step_is_run(direct: Any, recorded: Any) -> None:
    assert direct.report.kernels["step"] == "called directly"
    assert recorded.report.kernels["step"] == "one CUDA graph"
    assert recorded.report.compile_seconds > direct.report.compile_seconds


def test_only_compiled_steps_on_a_gpu_are_recorded() -> None:
    assert recorder_for(torch.device("cpu"), "inductor") is None
    assert recorder_for(torch.device("cuda", 0), "eager") is None
    assert recorder_for(torch.device("cuda", 0), "inductor") is not None


def test_recording_leaves_the_cache_as_it_was(direct: Any) -> None:
    """With a cache that holds something: no row is active while the step warms up and is recorded."""
    direct.reset()
    given = prompt(BATCH, 20, pads=(0, 5, 19))
    direct.prefill(given["input_ids"], given["attention_mask"])
    before, seen = everything(direct), direct.cache.seen_tokens
    RecordedStep(DirectStep(direct.decode_graph, seen, direct.cache.flat), seen, record)
    for was, now in zip(before, everything(direct), strict=True):
        assert torch.equal(was, now)


def test_200_recorded_steps_equal_called_ones(direct: Any, recorded: Any) -> None:
    """Past the budget, with rows that pause, a row emptied and refilled, and tokens as callers come by them."""
    generator, given = torch.Generator().manual_seed(0), prompt(BATCH, 12, pads=(0, 3, 11))
    sides = (direct, recorded)
    places = [tensor.data_ptr() for tensor in recorded.cache.flat]
    for side in sides:
        side.reset()
        side.prefill(given["input_ids"], given["attention_mask"])
    tokens = torch.randint(VOCAB, (BATCH, 200), generator=generator)
    awake = torch.rand(BATCH, 200, generator=generator) < 0.8
    for step in range(200):
        if step == 90:
            for side in sides:
                side.reset(rows=[1])
                side.prefill(prompt(1, 9, seed=3)["input_ids"], rows=[1])
        token, active = tokens[:, step : step + 1], awake[:, step] if step % 3 else None
        ours, theirs = (side.decode(token.int() if step % 2 else token, active) for side in (recorded, direct))
        rows = slice(None) if active is None else active
        assert torch.equal(ours[rows], theirs[rows])
    assert_same(recorded, direct)
    assert [tensor.data_ptr() for tensor in recorded.cache.flat] == places


def test_logits_of_a_recorded_step_belong_to_the_caller(recorded: Any) -> None:
    recorded.reset()
    recorded.prefill(prompt(BATCH, 5)["input_ids"])
    first = recorded.decode(torch.ones(BATCH, 1, dtype=torch.int64))
    kept = first.clone()
    second = recorded.decode(torch.full((BATCH, 1), 2))
    assert torch.equal(first, kept) and not torch.equal(second, first)


def test_generate_over_a_recorded_step(direct: Any, recorded: Any) -> None:
    for side in (direct, recorded):
        side.reset()
    ours, theirs = (turn(side, padded(), max_new_tokens=20, eos_token_id=[5, 9, 60]) for side in (recorded, direct))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_same(recorded, direct)


def test_refused_and_interrupted_steps_are_those_of_a_called_one(direct: Any) -> None:
    def breaking(run: Callable[[], Tensor]) -> Recording:
        recording = record(run)

        def replay() -> None:
            recording.replay()
            if armed:
                raise KeyboardInterrupt

        return Recording(replay, recording.output)

    armed = False
    compiled = again(direct, breaking)
    compiled.prefill(prompt(BATCH, 5)["input_ids"])
    before = everything(compiled)
    with pytest.raises(InputError, match="token_ids must be in"):
        compiled.decode(torch.full((BATCH, 1), VOCAB))
    for was, now in zip(before, everything(compiled), strict=True):
        assert torch.equal(was, now)
    armed = True
    with pytest.raises(KeyboardInterrupt):
        compiled.decode(torch.ones(BATCH, 1, dtype=torch.int64), torch.tensor([True, False, True]))
    assert compiled.cache.broken_rows() == [0, 2]
    with pytest.raises(CacheStateError, match="cache rows \\[0, 2\\] must be valid"):
        compiled.decode(torch.ones(BATCH, 1, dtype=torch.int64))


def test_a_model_recorded_in_inference_mode_works_outside(direct: Any) -> None:
    with torch.inference_mode():
        compiled = again(direct, record)
        compiled.prefill(prompt(BATCH, 5)["input_ids"])
        compiled.decode(torch.ones(BATCH, 1, dtype=torch.int64))
    compiled.decode(torch.ones(BATCH, 1, dtype=torch.int64))
    assert compiled.cache.seen_tokens.tolist() == [7] * BATCH


def test_the_stand_in_is_bound_to_memory_as_a_graph_is() -> None:
    """Else the tests above would let a step pass that reads a buffer put in place later, or a value on the host."""
    buffer, total = torch.ones(2), torch.zeros(2)

    def run() -> Tensor:
        return total.add_(buffer).clone()

    recording = record(run)
    assert total.tolist() == [2, 2] and recording.output.isnan().all()
    first = buffer
    buffer = torch.full((2,), 100.0)
    recording.replay()
    assert recording.output.tolist() == [3, 3]
    first.fill_(10.0)
    recording.replay()
    assert recording.output.tolist() == [13, 13] and total.tolist() == [13, 13]
    with pytest.raises(RuntimeError, match="the host asks for a value"):
        record(lambda: total * float(total[0]))
