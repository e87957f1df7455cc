"""TensorRT: steps by an engine that torch-tensorrt builds and TensorRT's runtime runs; prompts by Inductor.

Not run anywhere yet, for want of a machine with TensorRT: `tools/tensorrt_check` is the one command that would. What is
tested stops before TensorRT itself (tests/tensorrt/README.md says where).

The engine is a pure function (token_ids, seen, active, *state) -> (logits, *new state). Weights are constants in it, so
they lie twice on the device: in the engine, and in the model for prompts. While an engine is built and read they lie
there once more, and in the host's memory. `runtime/bound_step.py` binds the state: two sets of tensors that change
roles with every token, or one where the engine itself says that an output lies in the memory of its input. A step of
several segments is called, not recorded, and its results are copied.

Two layouts of keys and values were weighed, per layer:

| | all slots in one tensor, scatter | ring, context and residual apart, one linear write each |
| --- | --- | --- |
| operators, as torch-tensorrt 2.13 lowers them | 221 | 255 |
| layers its converters add to the network, constants aside | 477 | 617 |
| matrix products and scatters among them | 2 and 9 | 6 and 13 |
| memory traffic of a write | all of K and V read and written | the slot, if in place |

The second is made for TensorRT's KV-cache update layer, which writes in place. It is not taken:
- torch-tensorrt 2.13, the release for the newest PyTorch that this package supports, has no converter that makes that
  layer: the writes would be scatters there too, in more operators. Its successor makes it for batch 1 only.
- The layer has one index per batch entry, ours differ from head to head; heads would have to move into the batch.
- It is documented for attention that reads the cache after the write (the layer's output). Ours reads context and
  residual before: which slot is written depends on the attention paid. What a read of the input sees beside a write in
  place is not documented.
The price: a step moves three times the bytes of K and V that reading them once would, and holds them twice.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.lower import inductor
from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.lower.plan import Plan
from zsmerge_compile.lower.tensorrt_build import Built, check_segments, compiled_step, whole
from zsmerge_compile.lower.tensorrt_needs import library
from zsmerge_compile.program import Interface, Program
from zsmerge_compile.runtime.bound_step import BoundStep, Run
from zsmerge_compile.runtime.graphs import cuda_recorder


def lower(program: Program, segments: int = 1) -> Lowered:
    """Build the step's engine and compile the prompt's graph; needs what `tensorrt_needs.require` asks for.

    Raises UnsupportedGraphError if the step takes more than `segments` engines and parts in PyTorch.
    """
    compiled = compiled_step(program)
    made, count = check_segments(compiled, segments, hint=True)
    if count == 1:
        built = whole(compiled)
        del compiled  # it holds the engine, and a context for it, on the device
        step = one_engine(built, program.interface())
    else:
        step = BoundStep(Pieces(compiled), program.interface())
    prefill = inductor.lower_graph(program, "prefill", len(program.layouts) >= inductor.DEEP["cuda"])
    versions = " and ".join(f"{name} {library(name).__version__}" for name in ("torch_tensorrt", "tensorrt"))
    kernels = {"extend": prefill.kernel, "decode": f"{made}; {versions}"}
    return Lowered(prefill.run, step, kernels, {"prefill": prefill.parts, "decode": count})


def one_engine(built: Built, interface: Interface) -> BoundStep:
    """The step by its one engine, on a GPU its work recorded as CUDA graphs. Raises BundleError."""
    gc.collect()
    record = None
    if interface.device.type == "cuda":
        torch.cuda.empty_cache()  # TensorRT allocates beside PyTorch
        record = cuda_recorder(interface.device)
    return BoundStep(Plan(*built, interface), interface, record)


class Pieces:
    """An `Engine` of what torch-tensorrt compiled, called as a module: its results are copied into place."""

    in_place: frozenset[int] = frozenset()

    def __init__(self, module: Any) -> None:
        self._module = module

    def context(self) -> Run:
        """The module itself, which keeps contexts of its own."""

        def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
            for place, result in zip(outputs, self._module(*inputs), strict=True):
                place.copy_(result)

        return run
