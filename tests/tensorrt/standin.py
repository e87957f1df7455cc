"""Stand-ins for torch-tensorrt and TensorRT on the CPU: the calls that our code makes of them, on the graph itself.

As the real runtime does, an engine knows addresses only: it reads and writes what lies there when it runs, whatever
tensor object has been put over that memory since. It refuses an output over the memory of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import getitem
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

VERSION = "11.0.0 (stand-in)"
DTYPES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}


@dataclass
class Made:
    """An engine: run(*inputs) -> outputs; the tensors it takes and gives by name; output -> input in whose memory."""

    run: Callable[..., Sequence[Tensor]]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    aliased: dict[str, str] = field(default_factory=dict)
    on_host: set[str] = field(default_factory=set)


class Context:
    def __init__(self, made: Made) -> None:
        self._made = made
        self._addresses: dict[str, int] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        made = self._made
        inputs = {name: _at(self._addresses[name], like) for name, like in made.inputs.items()}
        outputs = {name: _at(self._addresses[name], like) for name, like in made.outputs.items()}
        for name, tensor in outputs.items():
            begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            for other, taken in inputs.items():
                if made.aliased.get(name) == other:
                    assert taken.data_ptr() == begin, f"{name} must lie in the memory of {other}"
                elif begin < taken.data_ptr() + taken.nbytes and taken.data_ptr() < end:
                    raise AssertionError(f"{name} lies over {other}")
        with torch.no_grad():
            for place, result in zip(outputs.values(), made.run(*inputs.values()), strict=True):
                place.copy_(result)
        return True


class Engine:
    def __init__(self, made: Made, content: bytes) -> None:
        self._made, self._content = made, content
        self._all = made.inputs | made.outputs
        self.num_io_tensors = len(self._all)

    def get_tensor_name(self, number: int) -> str:
        return list(self._all)[number]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=DTYPES[self._all[name].dtype])

    def get_tensor_shape(self, name: str) -> Any:
        return self._all[name].shape

    def is_shape_inference_io(self, name: str) -> bool:
        return name in self._made.on_host

    def serialize(self) -> bytes:
        return self._content

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._made.aliased.get(name)

    def create_execution_context(self) -> Context:
        return Context(self._made)


class TensorRT:
    """The module `tensorrt`; `made` has its engines by their serialized content."""

    __version__ = VERSION

    def __init__(self) -> None:
        self.made: dict[bytes, Made] = {}

    class Logger:
        WARNING = 2

        def __init__(self, severity: int) -> None: ...

    def Runtime(self, logger: Any) -> Any:
        def deserialize(content: bytes) -> Engine | None:
            return Engine(self.made[content], content) if content in self.made else None

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    def serialize(self, made: Made) -> bytes:
        content = f"engine {len(self.made)}".encode()
        self.made[content] = made
        return content


class _Segment(nn.Module):
    """What torch-tensorrt puts in the place of a segment."""

    def __init__(self, trt: TensorRT, made: Made) -> None:
        super().__init__()
        self.serialized_engine = trt.serialize(made)
        self.input_binding_names, self.output_binding_names = list(made.inputs), list(made.outputs)
        self._run = [made.run]

    def forward(self, *inputs: Tensor) -> Any:
        return tuple(self._run[0](*inputs))


def torch_tensorrt(trt: TensorRT, seen: list[dict[str, Any]]) -> Any:
    """The module `torch_tensorrt`, making engines for `trt`; `seen` gets the settings of every compilation.

    Inputs reach the engine in another order and under other names than the program's, as they may there.
    """

    def compile(
        program: torch.export.ExportedProgram,
        *,
        arg_inputs: Sequence[Tensor],
        attn_bias_is_causal: bool = True,
        disable_tf32: bool = False,
        use_fp32_acc: bool = False,
        enable_autocast: bool = False,
        truncate_double: bool = False,
        min_block_size: int = 5,
        require_full_compilation: bool = False,
        immutable_weights: bool = True,
        offload_module_to_cpu: bool = False,
        device: Any = None,
    ) -> fx.GraphModule:
        seen.append({name: value for name, value in locals().items() if name not in ("program", "arg_inputs", "seen")})
        run, results = program.module(), list(program.graph.output_node().args[0])
        order = list(reversed(range(len(arg_inputs))))

        def reordered(*given: Tensor) -> Sequence[Tensor]:
            return run(*(given[order.index(number)] for number in range(len(given))))

        inputs = {f"in_{place}": arg_inputs[number] for place, number in enumerate(order)}
        outputs = {f"output{number}": node.meta["val"] for number, node in enumerate(results)}
        graph = fx.Graph()
        placeholders = [graph.placeholder(f"x{number}") for number in range(len(arg_inputs))]
        call = graph.call_module("_run_on_acc_0", tuple(placeholders[number] for number in order))
        graph.output(tuple(graph.call_function(getitem, (call, number)) for number in range(len(results))))
        return fx.GraphModule({"_run_on_acc_0": _Segment(trt, Made(reordered, inputs, outputs))}, graph)

    return SimpleNamespace(dynamo=SimpleNamespace(compile=compile), __version__="2.13.0 (stand-in)")


def _at(address: int, like: Tensor) -> Tensor:
    """The tensor that lies at an address; a tape that is running does not see how it is made."""
    with _disable_current_modes():
        storage = torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), like.nbytes)
        strides = torch.empty(like.shape, device="meta").stride()
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, like.shape, strides)
