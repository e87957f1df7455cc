"""A loaded bundle is the model that was exported: token by token past the budget, and in everything a runner does."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import zsmerge_compile as zs
from tests.bundles.made import bundle, compiled, greedy
from tests.models_zoo import VOCAB, prompt
from zsmerge_compile.testing.tolerance import LOGITS_FP32

STEPS = 200
CASES = [
    (name, format, batch)
    for name in ("llama-gqa", "mistral-w8", "falcon-7b")
    for format in ("pt2", "aoti")
    for batch in (1, 3)
]
MORE = [("falcon-rw", "pt2", 3), ("falcon-new", "pt2", 3), ("llama-yarn", "pt2", 1)]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).abs().amax(-1) / (theirs.amax(-1) - theirs.amin(-1))
    assert bool((error <= LOGITS_FP32).all()), error.tolist()


def assert_same_turns(ours: Any, theirs: Any, batch: int) -> None:
    """200 greedy tokens, then more of a prompt, a row refilled alone, inactive rows, generate."""
    written, last = greedy(ours, batch, STEPS)
    expected, logits = greedy(theirs, batch, STEPS)
    assert torch.equal(written, expected)
    assert_close(last, logits)
    row = batch - 1
    active = torch.arange(batch) != row if batch > 1 else torch.ones(1, dtype=torch.bool)
    more, other = prompt(batch, 7, seed=3)["input_ids"], prompt(1, 200, seed=4)["input_ids"]
    token = torch.full((batch, 1), 5)
    answers = []
    for runner in (ours, theirs):
        turn = [runner.prefill(more)]
        runner.reset(rows=[row])
        turn += [runner.prefill(other, rows=[row]), runner.decode(token, active)[active], runner.decode(token)]
        answers.append(turn)
    for mine, yours in zip(*answers, strict=True):
        assert_close(mine, yours)
    assert ours.cache.seen_tokens.tolist() == theirs.cache.seen_tokens.tolist()
    given = prompt(batch, 12, pads=(0, 3, 11)[:batch])
    del given["position_ids"]
    texts = [runner.generate(**given, max_new_tokens=30, do_sample=False) for runner in (ours, theirs)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("name, format, batch", CASES + MORE)
def test_every_format_and_family(name: str, format: str, batch: int) -> None:
    assert_same_turns(zs.load(bundle(name, format, batch)), compiled(name, batch), batch)


@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_one_by_one_merging_and_chunked_prompts(format: str) -> None:
    how = ("llama-gqa", 3, "sequential", 16)
    assert_same_turns(zs.load(bundle("llama-gqa", format, *how[1:])), compiled(*how), 3)


def test_bundles_of_one_folder_do_not_share_their_caches() -> None:
    folder = bundle("llama-gqa", "pt2", 1)
    first, second = zs.load(folder), zs.load(folder)
    greedy(first, 1, 3)
    assert second.cache.seen_tokens.tolist() == [0]
    assert not any(bool(layer.weight.any()) for layer in second.cache.layers)


def test_a_fresh_process_needs_no_model_code() -> None:
    folder = bundle("llama-gqa", "pt2", 1)
    tokens = greedy(compiled("llama-gqa", 1), 1, 12)[0]
    ids = prompt(1, 30)["input_ids"]
    code = (
        "import sys, torch, zsmerge_compile as zs\n"
        f"runner = zs.load({str(folder)!r})\n"
        f"out = runner.generate(torch.tensor({ids.tolist()}), max_new_tokens=12, do_sample=False)\n"
        "print(out[0, 30:].tolist())\n"
        "print([name for name in sys.modules if name.startswith('transformers.models.') and 'modeling' in name\n"
        "       and 'auto' not in name])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-2:] == [str(tokens[0].tolist()), "[]"]


def test_weights_lie_once_in_the_bundle_and_in_memory() -> None:
    folder = bundle("llama-gqa", "pt2", 1)
    model = compiled("llama-gqa", 1).model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert (folder / "weights.safetensors").stat().st_size < 1.2 * weights + 8192
    for name in ("prefill", "decode"):
        assert b"data/weights/weight_" not in (folder / f"{name}.pt2").read_bytes()


def test_a_runner_refuses_what_the_model_refuses() -> None:
    runner = zs.load(bundle("llama-gqa", "pt2", 1))
    with pytest.raises(zs.ZSMergeError, match="input_ids must be in 0"):
        runner.prefill(torch.tensor([[VOCAB]]))
    with pytest.raises(zs.ZSMergeError, match="num_beams must be"):
        runner.generate(torch.tensor([[1]]), num_beams=2)
