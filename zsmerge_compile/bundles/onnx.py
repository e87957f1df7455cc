"""Format "onnx": two ONNX models for any runtime, the state an input and an output of each; run by onnxruntime here.

Weights are initializers whose bytes lie in the bundle's safetensors, once for both models. Needs zsmerge-compile[onnx].
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsmerge_compile.bundles.manifest import WEIGHTS
from zsmerge_compile.errors import BundleError, MissingBackendError, must
from zsmerge_compile.lower.functional import functional
from zsmerge_compile.lower.standard import Graph, exported

SUFFIX = ".onnx"
OPSET = 20
SMALL = 1024  # bytes of a tensor that lies in the model itself
_NUMPY = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.bool: np.bool_,
}
OUT = "_out"  # what a state tensor's name ends with as an output


def write(graph: Graph, weights: dict[str, Tensor], path: Path) -> None:
    """The graph's model at `path`, beside the weights' file. Raises MissingBackendError or BundleError."""
    require()
    if any(tensor.dtype not in _NUMPY for tensor in (*graph.example, *weights.values())):
        raise BundleError(
            must("dtype of an onnx bundle", "float32 or float16", "bfloat16, which onnxruntime cannot run on a CPU")
        )
    program = exported(functional(graph), weights)
    _refuse_bfloat16(program.graph_module)
    translate(graph, program, path)


def require() -> None:
    """Raises MissingBackendError where models cannot be written."""
    _library("onnx")
    _library("onnxscript")


def translate(graph: Graph, program: torch.export.ExportedProgram, path: Path) -> None:
    """The functional program of the graph as a model at `path`, in any dtype, beside the weights' file."""
    onnx = _library("onnx")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its pytrees and its translation
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        )
    assert made is not None
    model = made.model_proto
    names = [*graph.inputs, *graph.state, *graph.weights]
    _rename(model.graph, names, ["logits", *(name + OUT for name in graph.state)])
    _to_initializers(onnx, model.graph, graph.weights, path.parent / WEIGHTS)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))


def read(
    path: Path, inputs: Sequence[str], state: Sequence[tuple[str, Tensor]], weights: Mapping[str, Tensor]
) -> Callable[..., Tensor]:
    """(inputs, state) -> logits; the state tensors get the memory that holds the new state. Raises BundleError."""
    runtime = _library("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BundleError(must(path.name, "a model onnxruntime loads", f"{type(error).__name__}: {error}")) from error
    takes = [given.name for given in session.get_inputs()]
    names = [name for name, _ in state]
    if set(takes) - {*inputs, *names} or [out.name for out in session.get_outputs()] != [
        "logits",
        *(name + OUT for name in names),
    ]:
        raise BundleError(must(path.name, "a model for the manifest's cache", "one for another"))
    return _Bound(session, [*inputs, *names], set(takes), len(inputs))


def _refuse_bfloat16(gm: torch.fx.GraphModule) -> None:
    """Raises BundleError where the model itself rounds to bfloat16 on the way: onnxruntime has no arithmetic in it."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            got = f"bfloat16 in {node.name} (Falcon's ALiBi rounds to it)"
            raise BundleError(must("arithmetic of an onnx bundle", "float32 or float16", got, "use pt2 or aoti"))


class _Bound:
    """A session with its tensors bound in place.

    A model reads one set of state tensors and writes another; after each call the two change memory, so nothing is
    copied, and the caller's tensors hold the new state.
    """

    def __init__(self, session: Any, names: list[str], takes: set[str], inputs: int) -> None:
        self._session, self._names, self._takes, self._inputs = session, names, takes, inputs
        self._spare: list[Tensor] | None = None

    def __call__(self, *given: Tensor) -> Tensor:
        state = given[self._inputs :]
        if self._spare is None:
            self._spare = [torch.empty_like(tensor) for tensor in state]
        binding = self._session.io_binding()
        held = [tensor.contiguous() for tensor in given]  # until the call is over
        for name, tensor in zip(self._names, held, strict=True):
            if name in self._takes and tensor.numel():
                kind, shape = _NUMPY[tensor.dtype], tuple(tensor.shape)
                binding.bind_input(name, "cpu", 0, kind, shape, tensor.data_ptr())
            elif name in self._takes:  # onnxruntime refuses to bind no memory
                binding.bind_cpu_input(name, tensor.numpy())
        binding.bind_output("logits", "cpu")
        for name, tensor in zip(self._names[self._inputs :], self._spare, strict=True):
            if tensor.numel():
                kind, shape = _NUMPY[tensor.dtype], tuple(tensor.shape)
                binding.bind_output(name + OUT, "cpu", 0, kind, shape, tensor.data_ptr())
            else:
                binding.bind_output(name + OUT, "cpu")
        self._session.run_with_iobinding(binding)
        logits = torch.from_numpy(binding.get_outputs()[0].numpy())
        for tensor, spare in zip(state, self._spare, strict=True):
            tensor.data, spare.data = spare.data, tensor.data
        return logits


def _stable_sort(self: Any, *, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable as TopK, which puts the lower index first among equals."""
    from onnxscript import opset20

    op: Any = opset20

    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def _rename(graph: Any, inputs: list[str], outputs: list[str]) -> None:
    """Inputs and outputs in their order get these names, everywhere."""
    new = dict(zip((value.name for value in graph.input), inputs, strict=True))
    new |= dict(zip((value.name for value in graph.output), outputs, strict=True))
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = new.get(value.name, value.name)
    _rename_nodes(graph, new)


def _rename_nodes(graph: Any, new: dict[str, str]) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = new.get(name, name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_nodes(attribute.g, new)


def _to_initializers(onnx: Any, graph: Any, names: Sequence[str], file: Path) -> None:
    """The inputs `names` become initializers: small ones inside, as shape inference reads them; the others' bytes lie
    in the safetensors file."""
    content = np.memmap(file, np.uint8, "r")
    length = int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8 : 8 + length].tobytes())
    inputs = {value.name: value for value in graph.input}
    for name in names:
        begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
        kind = inputs[name].type.tensor_type
        tensor = onnx.TensorProto(name=name, data_type=kind.elem_type, dims=[d.dim_value for d in kind.shape.dim])
        if end - begin <= SMALL:
            tensor.raw_data = content[begin:end].tobytes()
        else:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": file.name, "offset": str(begin), "length": str(end - begin)}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
        graph.initializer.append(tensor)
        graph.input.remove(inputs[name])


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        hint = 'pip install "zsmerge-compile[onnx]"'
        raise MissingBackendError(must(name, "installed for onnx bundles", "no such module", hint)) from error
