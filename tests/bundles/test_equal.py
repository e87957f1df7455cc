"""A loaded bundle is the model that was exported: token by token past the budget, and in everything a runner does."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
import zipfile
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import zsmerge_compile as zs
from tests.bundles.made import bundle, compiled, greedy
from tests.models_zoo import VOCAB, prompt, tiny
from zsmerge_compile.bundles import manifest as manifests
from zsmerge_compile.testing.tolerance import LOGITS_FP32

STEPS = 200
LONG = [("mistral-w8", "aoti", 1), ("falcon-7b", "aoti", 1)]  # a minute and a half each, to compile
CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if case in LONG else [])
    for case in product(("llama-gqa", "mistral-w8", "falcon-7b"), ("pt2", "aoti", "onnx"), (1, 3))
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


@pytest.mark.parametrize("format", ["pt2", "aoti", "onnx"])
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


@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_weights_lie_once_in_the_bundle(format: str) -> None:
    folder = bundle("llama-gqa", format, 1)
    model = compiled("llama-gqa", 1).model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert (folder / "weights.safetensors").stat().st_size < 1.2 * weights + 8192
    embedding = model.model.embed_tokens.weight.detach().numpy().tobytes()
    assert embedding in (folder / "weights.safetensors").read_bytes()
    for name in ("prefill", "decode"):
        with zipfile.ZipFile(folder / f"{name}.pt2") as archive:
            assert not any(embedding in archive.read(member) for member in archive.namelist())


@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_weights_lie_once_in_memory_and_go_with_the_last_reader(format: str) -> None:
    """Both programs read the tensors they are given where these lie, and do not keep them."""
    folder = bundle("llama-gqa", format, 1)
    manifest, kind = manifests.read(folder), import_module(f"zsmerge_compile.bundles.{format}")
    arrays = {name: tensor.numpy().copy() for name, tensor in load_file(folder / "weights.safetensors").items()}
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    interface = manifest.interface(torch.device("cpu"))
    state = list(zip(interface.state_names, (t for layer in interface.allocate() for t in layer.values()), strict=True))
    tensors, ids = [tensor for _, tensor in state], torch.tensor([[7]])
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    given = {"prefill": (ids, zero[None], zero, zero, zero), "decode": (ids, one, one.bool())}
    runs = {
        name: kind.read(
            folder / program["file"], program["inputs"], state, {name: weights[name] for name in program["weights"]}
        )
        for name, program in manifest.programs.items()
    }
    before = {name: run(*given[name], *tensors).clone() for name, run in runs.items()}
    embedding = next(name for name in arrays if "embed_tokens" in name)
    arrays[embedding][7] += 1
    for name, run in runs.items():
        assert (run(*given[name], *tensors) - before[name]).abs().max() > 1e-3
    alive = weakref.ref(arrays[embedding])
    del run, runs, weights, arrays
    gc.collect()
    assert alive() is None


def test_onnx_models_stand_alone_and_share_the_weights_file() -> None:
    """Any runtime can drive them: plain arrays in, logits and the new state out, the given arrays untouched."""
    folder, model = bundle("llama-gqa", "onnx", 1), compiled("llama-gqa", 1)
    for name in ("prefill", "decode"):
        onnx.checker.check_model(str(folder / f"{name}.onnx"))
        stored = onnx.load(str(folder / f"{name}.onnx"), load_external_data=False)
        places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in stored.graph.initializer]
        assert {place["location"] for place in places if place} == {"weights.safetensors"}
        assert stored.opset_import[0].version == 20
    session = onnxruntime.InferenceSession(str(folder / "decode.onnx"))
    state = {name: tensor.numpy() for name, tensor in zip(model.interface.state_names, model.cache.flat, strict=True)}
    model.reset()
    given = {"input_ids": numpy.array([[7]]), "seen": numpy.array([0]), "active": numpy.array([True])}
    out = session.run(None, given | {name: array.copy() for name, array in state.items()})
    expected = model.decode(torch.tensor([[7]]))
    assert_close(torch.from_numpy(out[0]), expected)
    for name, array in zip([value.name for value in session.get_outputs()[1:]], out[1:], strict=True):
        numpy.testing.assert_allclose(array, state[name.removesuffix("_out")], atol=1e-5)


def test_onnx_refuses_bfloat16(tmp_path: Path) -> None:
    half = zs.compile(tiny("llama-gqa", torch.bfloat16), zs.ZSMergeConfig(12), backend="eager")
    with pytest.raises(zs.ZSMergeError, match="dtype of an onnx bundle must be float32 or float16, got bfloat16"):
        zs.export(half, tmp_path / "half", "onnx")
    with pytest.raises(zs.ZSMergeError, match="arithmetic of an onnx bundle must be float32 or float16, got bfloat16"):
        zs.export(compiled("falcon-rw", 1), tmp_path / "half", "onnx")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_no_residual_slots(format: str, tmp_path: Path) -> None:
    evicting = zs.compile(tiny("llama-gqa"), zs.ZSMergeConfig(12, residual=0), 1, backend="eager")
    assert torch.equal(
        greedy(zs.load(zs.export(evicting, tmp_path / "b", format)), 1, 30)[0], greedy(evicting, 1, 30)[0]
    )


def test_a_runner_refuses_what_the_model_refuses() -> None:
    runner = zs.load(bundle("llama-gqa", "pt2", 1))
    with pytest.raises(zs.ZSMergeError, match="input_ids must be in 0"):
        runner.prefill(torch.tensor([[VOCAB]]))
    with pytest.raises(zs.ZSMergeError, match="num_beams must be"):
        runner.generate(torch.tensor([[1]]), num_beams=2)
