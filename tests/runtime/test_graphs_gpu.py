"""What only a GPU can show: a captured step equals a called one, never waits, takes no memory, and costs no time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import pytest
import torch

import zsmerge_compile as zs
from tests.models_zoo import VOCAB, prompt, tiny
from tests.states import assert_same_states
from tests.test_equivalence import assert_same_logits
from zsmerge_compile.ops.state import State
from zsmerge_compile.runtime.graphs import DirectStep
from zsmerge_compile.runtime.loop import Draw

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BATCH, BUDGET = 3, 24


@pytest.fixture(scope="module")
def compiled() -> Any:
    model = tiny("llama-gqa").cuda()
    return zs.compile(model, zs.ZSMergeConfig(budget=BUDGET), batch_size=BATCH, backend="inductor")


def fill(compiled: Any) -> None:
    given = prompt(BATCH, 40, pads=(0, 9, 30))
    compiled.reset()
    compiled.prefill(given["input_ids"].cuda(), given["attention_mask"].cuda())


def columns(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (BATCH, steps), generator=generator)
    return tokens.cuda(), (torch.rand(BATCH, steps, generator=generator) < 0.8).cuda()


@contextmanager
def uncaptured(compiled: Any) -> Iterator[None]:
    captured = compiled._step
    compiled._step = DirectStep(compiled.decode_graph, compiled.cache.seen_tokens, compiled.cache.flat)
    yield
    compiled._step = captured


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any call that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_follows(ours: Any, theirs: Any, steps: int) -> None:
    """The same prompt and tokens, the other side's greedy ones: its logits, its next tokens, at the end its cache.

    Its tokens, so that one difference is not told as many. Devices may differ.
    """
    given = prompt(BATCH, 40, pads=(0, 9, 30))
    ids, mask = given["input_ids"], given["attention_mask"]
    expected, logits = theirs.prefill(ids, mask), ours.prefill(ids.to(ours.device), mask.to(ours.device))
    for step in range(steps):
        assert_same_logits(logits.cpu(), expected, f"step {step}")
        token = expected.argmax(-1, keepdim=True)
        assert torch.equal(logits.cpu().argmax(-1, keepdim=True), token), f"step {step}"
        expected, logits = theirs.decode(token), ours.decode(token.to(ours.device))
    assert torch.equal(ours.cache.seen_tokens.cpu(), theirs.cache.seen_tokens)
    for one, other in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        assert_same_states(State(**{name: t.cpu() for name, t in vars(one).items()}), State(**vars(other)), 1e-3)


def test_a_whole_captured_model_equals_the_eager_one_on_the_cpu() -> None:
    """Four layers, fp32: Triton's kernels, outlined as is the default here, one graph; 80 steps past the budget."""
    config, deep = zs.ZSMergeConfig(BUDGET, residual=2), dict(num_hidden_layers=4)
    ours = zs.compile(tiny("llama-gqa", **deep).cuda(), config, batch_size=BATCH, backend="inductor")
    theirs = zs.compile(tiny("llama-gqa", **deep), config, batch_size=BATCH, backend="eager")
    kernels = ours.report.kernels
    assert kernels["step"] == "one CUDA graph" and ours.report.parts["decode"] == 3, "first layer, alike ones, head"
    assert all(kernels[op].startswith("ops.triton (") for op in ("decode", "extend"))
    assert_follows(ours, theirs, steps=80)


def test_a_step_is_one_graph(compiled: Any) -> None:
    assert compiled.report.kernels["step"] == "one CUDA graph"


def test_200_captured_steps_equal_called_ones(compiled: Any) -> None:
    tokens, awake = columns(200)

    def run() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        fill(compiled)
        logits = [compiled.decode(tokens[:, i : i + 1], awake[:, i])[awake[:, i]] for i in range(200)]
        return logits, [tensor.clone() for tensor in (*compiled.cache.flat, compiled.cache.seen_tokens)]

    ours = run()
    with uncaptured(compiled):
        theirs = run()
    for one, other in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_step_never_waits_for_the_device(compiled: Any) -> None:
    fill(compiled)
    tokens, awake = columns(20)
    torch.cuda.synchronize()
    with no_waiting():
        for i in range(20):
            logits = compiled.decode(tokens[:, i : i + 1], awake[:, i] if i % 2 else None)
            tokens[:, (i + 1) % 20] = logits.argmax(-1)
    assert logits.isfinite().all()


@pytest.mark.parametrize("do_sample", [False, True])
def test_drawing_a_token_does_not_wait(compiled: Any, do_sample: bool) -> None:
    fill(compiled)
    logits = torch.randn(BATCH, VOCAB, device="cuda")
    draw = Draw(do_sample, logits)
    torch.cuda.manual_seed(3)
    with no_waiting():
        drawn = draw(logits)
    draw.check()
    torch.cuda.manual_seed(3)
    theirs = torch.multinomial(logits.softmax(-1), 1).squeeze(1) if do_sample else logits.argmax(-1)
    assert torch.equal(drawn, theirs)


def test_steps_take_no_memory(compiled: Any) -> None:
    fill(compiled)
    tokens, _ = columns(1)
    compiled.decode(tokens)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(300):
        compiled.decode(tokens)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_a_step_runs_on_the_stream_that_is_current(compiled: Any) -> None:
    fill(compiled)
    tokens, _ = columns(1)
    expected = compiled.decode(tokens)
    compiled.decode((tokens + 1) % VOCAB)  # what a step on another stream would still find in the buffer
    fill(compiled)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        moved = tokens.clone()
        logits = compiled.decode(moved)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(logits, expected)


def test_tokens_equal_those_of_transformers_loop(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stop at different steps, the host looks every few of them, and the extra steps leave no trace."""
    rows = prompt(BATCH, 20, pads=(0, 3, 9))
    given = {name: rows[name].cuda() for name in ("input_ids", "attention_mask")}
    free = compiled.generate(**given, max_new_tokens=40, do_sample=False, eos_token_id=None)
    ends = [int(free[row, 20 + 5 * row + 3]) for row in range(BATCH)]
    for do_sample in (False, True):
        options: dict[str, Any] = dict(max_new_tokens=40, do_sample=do_sample, eos_token_id=ends, pad_token_id=0)
        results = []
        for each_token in (False, True):
            monkeypatch.setattr("zsmerge_compile.runtime.generate.wants_each_token", lambda _, on=each_token: on)
            torch.cuda.manual_seed(11)
            out = compiled.generate(**given, **options)
            results.append([out, *(t.clone() for t in (*compiled.cache.flat, compiled.cache.seen_tokens))])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_generate_costs_no_more_than_a_bare_loop(compiled: Any) -> None:
    """SPEC: 5% on a model of a real size. Its step takes milliseconds, so a tiny model's is given 0.1 ms of slack."""
    ids, new = prompt(BATCH, 64)["input_ids"].cuda(), 256

    def bare() -> None:
        compiled.reset()
        token = compiled.prefill(ids).argmax(-1, keepdim=True)
        for _ in range(new - 1):
            token = compiled.decode(token).argmax(-1, keepdim=True)

    free = compiled.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)
    never = next(token for token in range(1, VOCAB) if not (free == token).any())

    def generate() -> None:
        compiled.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=[never], pad_token_id=0)

    def seconds(run: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    bare(), generate()
    pairs = [(seconds(bare), seconds(generate)) for _ in range(9)]
    ours, theirs = median(pair[1] for pair in pairs), median(pair[0] for pair in pairs)
    assert ours <= 1.05 * theirs + new * 1e-4
