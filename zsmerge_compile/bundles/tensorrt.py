"""Format "tensorrt": a TensorRT engine for tokens and an AOTInductor package for prompts, for the GPU that wrote them.

    decode.engine       TensorRT's own serialized engine, weights included
    decode.engine.json  its names of the step's inputs and outputs, in the step's order, and the TensorRT that built it
    decode.onnx         the same step for other builders and runtimes, its weights in the bundle's safetensors
    trtexec.txt         the line that builds an engine of decode.onnx
    prefill.pt2         as in format "aoti"

torch_tensorrt.save would write the engine as a pickled object beside pickled settings; a bundle holds no pickle, so it
has the engine alone. Not run yet: see `lower/tensorrt.py`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from zsmerge_compile.bundles import aoti, onnx
from zsmerge_compile.errors import BundleError, InputError, must
from zsmerge_compile.lower import tensorrt_needs
from zsmerge_compile.lower.functional import functional, without_empty
from zsmerge_compile.lower.plan import Binding, Plan
from zsmerge_compile.lower.standard import Graph, exported
from zsmerge_compile.lower.tensorrt import one_engine
from zsmerge_compile.lower.tensorrt_build import Built, compiled_step, respelled, whole
from zsmerge_compile.lower.tensorrt_needs import library
from zsmerge_compile.program import Interface
from zsmerge_compile.runtime.bound_step import BoundStep

SUFFIX = aoti.SUFFIX
ENGINE = "decode.engine"
write, read = aoti.write, aoti.read  # prompts

# Networks are always strongly typed from TensorRT 11 on; the flag asks 10 for it.
# What it builds is for other runtimes: a bundle is loaded with the engine that was written into it.
TRTEXEC = "trtexec --onnx=decode.onnx --saveEngine=decode.trtexec.engine --stronglyTyped --noTF32\n"


def check(compiled: Any) -> None:
    """Raises MissingBackendError or InputError where no such bundle can be written."""
    tensorrt_needs.require()
    onnx.require()
    if compiled.device.type != "cuda":
        raise InputError(must("model of a tensorrt bundle", "on the GPU", f"on {compiled.device}", "model.cuda()"))
    parts = compiled.report.parts["decode"] if compiled.report.backend == "tensorrt" else 1
    if parts > 1:
        raise InputError(must("step of a tensorrt bundle", "one engine", f"{parts} segments"))


def check_here() -> None:
    """Raises MissingBackendError where no such bundle can be run."""
    tensorrt_needs.require(tensorrt_needs.RUN)


def write_step(compiled: Any, graph: Graph, weights: dict[str, Tensor], folder: Path) -> str:
    """The step in all its forms; the engine's file. Raises UnsupportedGraphError if it takes more than one engine."""
    built = _built(compiled)
    (folder / ENGINE).write_bytes(built.content)
    facts = {**built.binding._asdict(), "tensorrt": library("tensorrt").__version__}
    (folder / f"{ENGINE}.json").write_text(json.dumps(facts, indent=1) + "\n")
    kept = without_empty(graph)
    onnx.translate(kept, respelled(exported(functional(kept), weights)), folder / "decode.onnx")
    (folder / "trtexec.txt").write_text(TRTEXEC)
    return ENGINE


def read_step(folder: Path, file: str, interface: Interface, files: Collection[str]) -> BoundStep:
    """The step by the bundle's engine; files: those that the manifest has checked. Raises BundleError."""
    if f"{file}.json" not in files:
        raise BundleError(must("manifest's files", f"with {file}.json", "without"))
    binding, version = _facts(folder / f"{file}.json")
    here = library("tensorrt").__version__
    if version != here:
        raise BundleError(must("TensorRT", f"{version}, which built this bundle's engine", here, "export it again"))
    return one_engine(Built((folder / file).read_bytes(), binding), interface)


def _built(compiled: Any) -> Built:
    """The engine that `compiled` runs by, or one that is built now."""
    plan = getattr(compiled.decode_graph, "engine", None)
    if isinstance(plan, Plan):
        return Built(plan.content, plan.binding)
    return whole(compiled_step(compiled.program))


def _facts(path: Path) -> tuple[Binding, str]:
    """The names in a bundle's engine, and the TensorRT that built it. Raises BundleError."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        binding = Binding(tuple(facts["inputs"]), tuple(facts["outputs"]))
        good = all(isinstance(name, str) for name in (*(n for n in binding.inputs if n is not None), *binding.outputs))
        version = facts["tensorrt"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(must(path.name, "as zs.export writes it", f"{type(error).__name__}: {error}")) from error
    if not good or not isinstance(version, str):
        raise BundleError(must(path.name, "as zs.export writes it", "names that are no text"))
    return binding, version
