"""From a compiled model to a bundle: a folder with everything a later process needs, and no pickle."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

import zsmerge_compile
from zsmerge_compile import tensor_file
from zsmerge_compile.bundles import manifest
from zsmerge_compile.bundles.manifest import WEIGHTS
from zsmerge_compile.errors import BundleError, InputError, MissingBackendError, must
from zsmerge_compile.lower import standard
from zsmerge_compile.runtime.model import CompiledModel

FORMATS = ("pt2", "aoti", "onnx", "tensorrt")


def export(
    compiled: CompiledModel, path: str | os.PathLike[str], format: str = "pt2", *, tokenizer: Any = None
) -> Path:
    """Write `compiled` as a bundle into the folder `path`, which must be new or empty; returns the folder.

    format     "pt2": programs of torch.export, for any machine with PyTorch, run node by node; "aoti": machine code by
               AOTInductor, for the kind of device and processor it was written on; "onnx": two ONNX models with the
               state as inputs and outputs, for any runtime, float32 or float16; "tensorrt": a TensorRT engine for
               tokens and an AOTInductor package for prompts, for the GPU they were written on, and the engine's graph
               in ONNX with the `trtexec` line that builds it elsewhere (not run yet, see `lower/tensorrt.py`)
    tokenizer  a transformers tokenizer whose files go along

    The graphs hold standard operators only, whatever backend `compiled` has: its kernels stay behind. The cache's
    content does not go along. Raises InputError, MissingBackendError or BundleError; a folder appears whole or not at
    all.
    """
    if not isinstance(compiled, CompiledModel):
        raise InputError(must("compiled", "what zs.compile returned", type(compiled).__name__))
    if format not in FORMATS:
        raise MissingBackendError(must("format", f"one of {', '.join(FORMATS)}", repr(format)))
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BundleError(must("path", "a new or empty folder", str(folder)))
    if not folder.parent.is_dir():
        raise BundleError(must("path", "in a folder that exists", str(folder)))
    if format == "tensorrt":
        import_module("zsmerge_compile.bundles.tensorrt").check(compiled)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as draft:
        inner = Path(draft) / "bundle"
        inner.mkdir()
        _write(compiled, inner, format, tokenizer)
        if folder.exists():
            folder.rmdir()
        shutil.move(inner, folder)
    return folder


def _write(compiled: CompiledModel, folder: Path, format: str, tokenizer: Any) -> None:
    program = compiled.program
    graphs = standard.graphs(program)
    tensor_file.write({name: _own(tensor) for name, tensor in graphs.weights.items()}, folder / WEIGHTS)
    programs = _programs(compiled, graphs, folder, import_module(f"zsmerge_compile.bundles.{format}"))
    for name in ("config", "generation_config"):
        told = getattr(compiled, name)
        if told is not None:
            (folder / f"{name}.json").write_text(json.dumps(told.to_dict(), indent=1, default=str) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
    interface, config = program.interface(), program.policy.describe()
    manifest.Manifest(
        format=format,
        versions={"zsmerge_compile": zsmerge_compile.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers")},
        model={
            "class": compiled.report.model,
            "vocab_size": interface.vocab_size,
            "max_positions": interface.max_positions,
            "max_places": interface.max_places,
        },
        policy={"name": program.policy.name, "state": interface.kind, "config": config},
        cache={
            "batch_size": interface.batch_size,
            "dtype": manifest.dtype_name(interface.dtype),
            "device": interface.device.type,
            "layers": [
                [[name, list(spec.shape), manifest.dtype_name(spec.dtype)] for name, spec in layer.items()]
                for layer in interface.state
            ],
            "parts": list(interface.parts),
        },
        chunk=compiled.chunk,
        programs=programs,
        files=manifest.checksums(folder),
    ).write(folder)


def _programs(compiled: CompiledModel, graphs: standard.Graphs, folder: Path, kind: Any) -> dict[str, dict[str, Any]]:
    """Write both programs; what the manifest says of them."""
    programs = {}
    for name in ("prefill", "decode"):
        graph: standard.Graph = getattr(graphs, name)
        if hasattr(kind, "write_step") and name == "decode":
            file = kind.write_step(compiled, graph, graphs.weights, folder)
        else:
            file = f"{name}{kind.SUFFIX}"
            kind.write(graph, graphs.weights, folder / file)
        programs[name] = {"file": file, "inputs": list(graph.inputs), "weights": list(graph.weights)}
    return programs


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy: safetensors refuses tensors that share memory, and parameters may be views of one."""
    return tensor.detach().to("cpu", copy=True).contiguous()
