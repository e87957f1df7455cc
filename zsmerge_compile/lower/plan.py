"""A serialized TensorRT engine ("plan"), run on the memory it is given: TensorRT's own runtime, nothing in between.

torch-tensorrt's module around an engine allocates its outputs, and in its CUDA-graph mode copies every input and every
output once more: with a cache among them, four times the cache's bytes per token. Here state tensors are bound by
address, so the engine reads and writes them where they lie, and `execute_async_v3` is what a CUDA graph records.

Not run anywhere yet: TensorRT could not be installed where this was written. The tests drive it with a stand-in of the
calls it makes, whose names are checked against TensorRT 11.0's Python bindings (tests/tensorrt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsmerge_compile.errors import BundleError, must
from zsmerge_compile.lower.tensorrt_needs import library, on
from zsmerge_compile.program import Interface, TensorSpec
from zsmerge_compile.runtime.bound_step import Run

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


class Binding(NamedTuple):
    """The engine's names of what a step gives and takes, in the step's order: logits first among the outputs.

    An input that the step's graph does not read has no name in the engine: None.
    """

    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]


def expected(interface: Interface) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a step's engine."""
    batch = interface.batch_size
    state = [spec for layer in interface.state for spec in layer.values() if 0 not in spec.shape]
    rows = [TensorSpec((batch, 1), torch.int64), TensorSpec((batch,), torch.int64), TensorSpec((batch,), torch.bool)]
    return [*rows, *state], [TensorSpec((batch, interface.vocab_size), interface.dtype), *state]


class Plan:
    """An `Engine` (`runtime/bound_step.py`). Raises BundleError for an engine made for other tensors."""

    def __init__(self, content: bytes, binding: Binding, interface: Interface) -> None:
        trt = library("tensorrt")
        self.binding, self._device = binding, interface.device
        with on(self._device):
            self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))  # host code stays disallowed, as by default
            self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            got = f"one of {len(content):,} bytes that it does not read, or no memory for it"
            hint = "TensorRT's log says which; build it again on this machine"
            raise BundleError(must("engine", f"one that TensorRT {trt.__version__} reads here", got, hint))
        self._check(interface)
        aliased = [self._engine.get_aliased_input_tensor(name) for name in binding.outputs[1:]]
        self.in_place = frozenset(
            place for place, name in enumerate(aliased) if name and name == binding.inputs[3 + place]
        )

    @property
    def content(self) -> bytes:
        """The engine, serialized."""
        return bytes(self._engine.serialize())

    def context(self) -> Run:
        """An execution context of its own. Raises BundleError where memory for its activations is lacking."""
        with on(self._device):
            context: Any = self._engine.create_execution_context()
        if context is None:
            raise BundleError(must("memory for the engine's activations", "available", "too little"))
        names = (*self.binding.inputs, *self.binding.outputs)

        def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
            for name, tensor in zip(names, (*inputs, *outputs), strict=True):
                if name is not None and not context.set_tensor_address(name, tensor.data_ptr()):
                    raise RuntimeError(f"TensorRT did not take the address of {name}")
            with on(self._device):
                cuda = self._device.type == "cuda"
                stream = torch.cuda.current_stream(self._device).cuda_stream if cuda else 0
                if not context.execute_async_v3(stream):
                    raise RuntimeError("TensorRT did not run the engine; its log says why")

        return run

    def _check(self, interface: Interface) -> None:
        """Every name, shape and dtype: a state tensor in 16 bits would be read as garbage, not refused."""
        engine, (inputs, outputs) = self._engine, expected(interface)
        names = [name for name in (*self.binding.inputs, *self.binding.outputs) if name is not None]
        counts = [len(self.binding.inputs), len(self.binding.outputs), len(set(names))]
        if counts != [len(inputs), len(outputs), len(names)]:
            got = f"{counts[0]} and {counts[1]}, or one twice"
            raise BundleError(must("engine's inputs and outputs", f"{len(inputs)} and {len(outputs)}", got))
        given = {name: spec for name, spec in zip(self.binding.inputs, inputs, strict=True) if name is not None}
        given |= dict(zip(self.binding.outputs, outputs, strict=True))
        there = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
        if there != set(given):
            odd = sorted(there ^ set(given))[0]
            raise BundleError(must("engine's inputs and outputs", "those of this cache", f"a difference in {odd!r}"))
        for name, spec in given.items():
            if engine.is_shape_inference_io(name):
                raise BundleError(must(f"engine's {name}", "a tensor on the device", "one that the host reads"))
            dtype = DTYPES.get(engine.get_tensor_dtype(name).name)
            shape = tuple(engine.get_tensor_shape(name))
            if (shape, dtype) != (spec.shape, spec.dtype):
                must_be, is_now = (f"{list(size)} {kind}" for size, kind in (spec, (shape, dtype)))
                raise BundleError(must(f"engine's {name}", must_be, is_now))
