"""Bundles with an engine: written, read and refused with the stand-in; the ONNX beside it by onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch

import zsmerge_compile as zs
from tests.tensorrt.conftest import Tools
from tests.tensorrt.test_step import BATCH, bound, eager, in_place, session
from zsmerge_compile.bundles import manifest
from zsmerge_compile.bundles import tensorrt as kind
from zsmerge_compile.errors import BundleError, MissingBackendError
from zsmerge_compile.lower import tensorrt_needs

LISTED = {
    name: set(types)
    for name, *types in map(str.split, (Path(__file__).parent / "onnx_operators.txt").read_text().splitlines())
    if name != "#"
}


@pytest.fixture
def written(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a bundle into a folder as if TensorRT and a GPU were here; prompts stay the eager model's own graph."""
    monkeypatch.setattr(tensorrt_needs, "missing", lambda *_: None)
    monkeypatch.setattr(kind, "check", lambda _: None)
    monkeypatch.setattr(kind, "write", lambda graph, weights, path: path.write_bytes(b"prompts"))

    def write(folder: Path, name: str = "llama-gqa", residual: int = 2, dtype: torch.dtype = torch.float32) -> Path:
        base = eager(name, residual, dtype)
        monkeypatch.setattr(kind, "read", lambda *_: base.prefill_graph)
        return zs.export(base, folder, "tensorrt")

    return write


def test_a_loaded_bundle_is_the_step_in_place(written: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "bundle")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.json", "decode.engine", "decode.engine.json", "decode.onnx", "generation_config.json"),
        *("manifest.json", "prefill.pt2", "trtexec.txt", "weights.safetensors"),
    ]
    session(zs.load(folder), in_place(eager("llama-gqa")))
    line = (folder / "trtexec.txt").read_text()
    assert line == "trtexec --onnx=decode.onnx --saveEngine=decode.trtexec.engine --stronglyTyped --noTF32\n"


def test_the_engine_a_model_runs_by_is_the_one_that_is_written(written: Any, tools: Tools, tmp_path: Path) -> None:
    ours = bound(eager("llama-gqa"))
    (content,) = tools.trt.made
    folder = zs.export(ours, tmp_path / "bundle", "tensorrt")
    assert (folder / "decode.engine").read_bytes() == content and len(tools.trt.made) == 1


def test_where_tensorrt_is_not_a_bundle_is_refused(
    written: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, asked = written(tmp_path / "bundle"), []
    monkeypatch.setattr(tensorrt_needs, "missing", lambda needed: asked.append(needed) or "TensorRT must be installed")
    with pytest.raises(MissingBackendError, match="TensorRT must be installed"):
        zs.load(folder)
    assert asked == [("tensorrt",)], "an engine runs without torch-tensorrt"


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "decode.engine.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    signed(folder)


def signed(folder: Path, without: str = "") -> None:
    path = folder / manifest.NAME
    files = {name: facts for name, facts in manifest.checksums(folder).items() if name != without}
    path.write_text(manifest.sealed(json.loads(path.read_text()) | {"files": files}))


def test_other_engines_and_names_are_refused(written: Any, tools: Tools, tmp_path: Path) -> None:
    folder = written(tmp_path / "bundle")
    facts = (folder / "decode.engine.json").read_text()
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda raw: raw.update(tensorrt="10.0.0"), "TensorRT must be 10.0.0, which built this bundle's engine"),
        (lambda raw: raw["inputs"].pop(), "inputs and outputs must be 21 and 19"),
        (lambda raw: raw["outputs"].__setitem__(1, raw["outputs"][2]), "or one twice"),
        (lambda raw: raw["outputs"].__setitem__(1, "other"), "a difference in 'other'"),
        (lambda raw: raw["outputs"].reverse(), r"engine's output18 must be \[3, 128\] torch.float32, got \[3, 2, 2\]"),
        (lambda raw: raw.update(inputs=[1]), "names that are no text"),
        (lambda raw: raw.pop("outputs"), "KeyError"),
    ]
    for change, message in changes:
        (folder / "decode.engine.json").write_text(facts)
        edited(folder, change)
        with pytest.raises(BundleError, match=message):
            zs.load(folder)
    (folder / "decode.engine.json").write_text(facts)
    signed(folder, without="decode.engine.json")
    with pytest.raises(BundleError, match=r"manifest's files must be with decode.engine.json, got without"):
        zs.load(folder)
    (made,) = tools.trt.made.values()
    made.on_host.add("in_0")
    signed(folder)
    with pytest.raises(BundleError, match="engine's in_0 must be a tensor on the device, got one that the host reads"):
        zs.load(folder)
    (folder / "decode.engine").write_bytes(b"another")
    signed(folder)
    with pytest.raises(BundleError, match="engine must be one that TensorRT .* reads here, got one of 7 bytes that it"):
        zs.load(folder)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama-gqa", torch.float32), ("mistral-w8", torch.float16), ("falcon-7b", torch.bfloat16), ("falcon-rw", None)],
)
def test_onnx_holds_only_what_tensorrt_lists(name: str, dtype: Any, written: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "bundle", name, 2, dtype or torch.float32)
    model = onnx.load(str(folder / "decode.onnx"), load_external_data=False)
    graph, kinds = model.graph, onnx.TensorProto.DataType
    types = {value.name: kinds.Name(value.type.tensor_type.elem_type)
             for value in (*graph.input, *graph.output, *graph.value_info)}  # fmt: skip
    types |= {tensor.name: kinds.Name(tensor.data_type) for tensor in graph.initializer}
    fixed = {tensor.name for tensor in graph.initializer}
    fixed |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    assert 9 <= model.opset_import[0].version <= 24 and len(graph.node) > 200
    for node in graph.node:
        assert node.op_type in LISTED, node.op_type
        data = node.input[1 if node.op_type == "Where" else 0] if node.input else node.output[0]
        assert types.get(data, "FLOAT") in LISTED[node.op_type], (node.op_type, types[data])
        if node.op_type.startswith("Reduce") and len(node.input) > 1:
            assert node.input[1] in fixed, f"axes of {node.op_type} must be known"
    scores = [value for value in graph.output if value.name.endswith(("score_out", "weight_out"))]
    assert {kinds.Name(value.type.tensor_type.elem_type) for value in scores} == {"FLOAT"}
    softmax = [types[node.input[0]] for node in graph.node if node.op_type == "Softmax"]
    assert softmax == ["FLOAT"] * 2


def test_onnx_is_the_same_step(written: Any, tmp_path: Path) -> None:
    base = eager("llama-gqa")
    reference = in_place(base)
    session(reference, in_place(base), steps=20)
    state = dict(zip(base.interface.state_names, reference.cache.flat, strict=True))
    names = {"input_ids": numpy.array([[7]] * BATCH), "seen": reference.cache.seen_tokens.numpy().copy()}
    given = names | {"active": numpy.array([True] * BATCH)} | {n: t.numpy().copy() for n, t in state.items()}
    model = onnxruntime.InferenceSession(str(written(tmp_path / "bundle") / "decode.onnx"))
    logits, *new = model.run(None, given)
    expected = reference.decode(torch.full((BATCH, 1), 7))
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-4)
    for place, array in zip(model.get_outputs()[1:], new, strict=True):
        numpy.testing.assert_allclose(array, state[place.name.removesuffix("_out")].numpy(), atol=1e-5)


def test_no_residual_slots_no_empty_tensors(written: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "bundle", "mistral-w8", 0)
    names = json.loads((folder / "decode.engine.json").read_text())["inputs"]
    assert len(names) == 3 + 2 * 5
    session(zs.load(folder), in_place(eager("mistral-w8", 0)), steps=12)
