"""A TensorRT network definition that computes: the layers that torch-tensorrt's converters add, evaluated by PyTorch.

A converter that cannot convert what we give it, or makes something else of it, shows here without TensorRT. Layers
check what TensorRT documents of strongly typed networks: operands of one type and rank, indices of integers. That
TensorRT takes the network, and what it computes by it, is not shown.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsmerge_compile.lower.plan import DTYPES

INTEGERS = (torch.int32, torch.int64)


class NetworkTensor:
    """Stands for tensorrt.ITensor."""

    trt: Any = None

    def __init__(self, layer: Layer, index: int, name: str) -> None:
        self._layer, self._index, self.name = layer, index, name
        self.is_shape_tensor = self.is_network_input = False

    @property
    def value(self) -> Tensor:
        return self._layer.values()[self._index]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        return _trt_dtype(self.value.dtype)


class Weights:
    """Stands for tensorrt.Weights: type, address and count of elements."""

    def __init__(self, type: Any, address: int, count: int) -> None:
        self.type, self.address, self.count = type, address, count

    def tensor(self) -> Tensor:
        kind = DTYPES[self.type.name]
        content = bytearray(ctypes.string_at(self.address, self.count * kind.itemsize))
        return torch.frombuffer(content, dtype=kind)


class Layer:
    """Computes once it is asked, with the settings it has then; a change of settings computes anew."""

    type = SimpleNamespace(name="LAYER")

    def __init__(self, kind: str, run: Callable[[Layer], Tensor | tuple[Tensor, ...]], *inputs: Any, **given: Any):
        self.__dict__.update(kind=kind, _run=run, inputs=list(inputs), _values=None, settings=dict(given))
        self.__dict__["_outputs"] = [NetworkTensor(self, number, f"{kind}_{number}") for number in range(2)]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("name", "metadata"):
            self.__dict__[name] = value
        else:
            self.settings[name], self.__dict__["_values"] = value, None

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get("settings", {}):
            raise AttributeError(f"{self.kind} layer has no {name}")
        return self.settings[name]

    def forget(self) -> None:
        self.__dict__["_values"] = None

    def get_output(self, number: int) -> NetworkTensor:
        return self._outputs[number]

    def get_input(self, number: int) -> NetworkTensor:
        return self.inputs[number]

    def set_input(self, number: int, tensor: NetworkTensor) -> None:
        self.inputs.extend([None] * (number + 1 - len(self.inputs)))
        self.inputs[number] = tensor
        self.forget()

    def given(self, number: int) -> Tensor:
        return self.inputs[number].value

    def values(self) -> tuple[Tensor, ...]:
        if self._values is None:
            result = self._run(self)
            self.__dict__["_values"] = result if isinstance(result, tuple) else (result,)
        return self._values


def _same(kind: str, *tensors: Tensor) -> None:
    assert len({t.dtype for t in tensors}) == 1, f"{kind}: types {[t.dtype for t in tensors]}"
    assert len({t.dim() for t in tensors}) == 1, f"{kind}: ranks {[t.dim() for t in tensors]}"


def _trt_dtype(dtype: torch.dtype) -> Any:
    return getattr(NetworkTensor.trt.DataType, next(name for name, known in DTYPES.items() if known is dtype))


def _axes(mask: int) -> list[int]:
    return [axis for axis in range(8) if mask >> axis & 1]


def _elementwise(layer: Layer) -> Tensor:
    one, other, op = layer.given(0), layer.given(1), layer.op.name
    _same(f"elementwise {op}", one, other)
    if op in ("AND", "OR", "XOR"):
        assert one.dtype == torch.bool, f"{op} of {one.dtype}"
    elif op not in ("EQUAL",):
        assert one.dtype != torch.bool, f"{op} of bool"
    if op == "DIV" and one.dtype in INTEGERS:
        return torch.div(one, other, rounding_mode="trunc")
    runs: dict[str, Any] = {
        "SUM": torch.add, "SUB": torch.sub, "PROD": torch.mul, "DIV": torch.div, "POW": torch.pow,
        "MAX": torch.maximum, "MIN": torch.minimum, "AND": torch.logical_and, "OR": torch.logical_or,
        "XOR": torch.logical_xor, "EQUAL": torch.eq, "GREATER": torch.gt, "LESS": torch.lt,
        "FLOOR_DIV": torch.floor_divide,
    }  # fmt: skip
    return runs[op](one, other)


def _unary(layer: Layer) -> Tensor:
    x, op = layer.given(0), layer.op.name
    runs: dict[str, Any] = {
        "EXP": torch.exp, "LOG": torch.log, "SQRT": torch.sqrt, "RECIP": torch.reciprocal, "ABS": torch.abs,
        "NEG": torch.neg, "SIN": torch.sin, "COS": torch.cos, "FLOOR": torch.floor, "CEIL": torch.ceil,
        "ERF": torch.erf, "NOT": torch.logical_not, "SIGN": torch.sign,
    }  # fmt: skip
    assert (x.dtype == torch.bool) == (op == "NOT"), f"{op} of {x.dtype}"
    assert x.is_floating_point() or op in ("NOT", "NEG", "ABS", "SIGN"), f"{op} of {x.dtype}"
    return runs[op](x)


def _activation(layer: Layer) -> Tensor:
    x, op = layer.given(0), layer.function.name
    assert x.is_floating_point(), f"{op} of {x.dtype}"
    if op == "CLIP":
        return x.clamp(layer.alpha, layer.beta)
    gelu = torch.nn.functional.gelu
    runs: dict[str, Any] = {
        "SIGMOID": torch.sigmoid, "RELU": torch.relu, "TANH": torch.tanh, "GELU_ERF": gelu,
        "GELU_TANH": lambda x: gelu(x, approximate="tanh"),
    }  # fmt: skip
    return runs[op](x)


def _shuffle(layer: Layer) -> Tensor:
    x, settings = layer.given(0), layer.settings
    if settings.get("first_transpose") is not None:
        x = x.permute(tuple(settings["first_transpose"]))
    dims = layer.given(1).tolist() if len(layer.inputs) > 1 else settings.get("reshape_dims")
    if dims is not None:
        sizes = [x.shape[place] if size == 0 and x.numel() else size for place, size in enumerate(dims)]
        x = x.reshape(sizes)
    if settings.get("second_transpose") is not None:
        x = x.permute(tuple(settings["second_transpose"]))
    return x.contiguous()


def _slice(layer: Layer) -> Tensor:
    x = layer.given(0)
    parts = [layer.start, layer.shape, layer.stride]
    for number in range(1, min(4, len(layer.inputs))):
        if layer.inputs[number] is not None:
            parts[number - 1] = layer.given(number).tolist()
    assert all(len(part) == x.dim() for part in parts), f"slice of rank {x.dim()} by {parts}"
    for axis, (start, size, stride) in enumerate(zip(*parts, strict=True)):
        index = torch.arange(size) * stride + start
        assert size == 0 or 0 <= int(index.min()) <= int(index.max()) < x.shape[axis], f"slice out of bounds: {parts}"
        x = x.index_select(axis, index)
    return x


def _gather(layer: Layer) -> Tensor:
    data, index, mode = layer.given(0), layer.given(1), layer.mode.name
    assert index.dtype in INTEGERS, f"gather by {index.dtype}"
    if mode == "ELEMENT":
        return data.gather(layer.axis, index.long())
    assert mode == "DEFAULT"
    axis = layer.axis
    flat = data.index_select(axis, index.long().flatten())
    return flat.reshape(*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])


def _scatter(layer: Layer) -> Tensor:
    data, index, new = (layer.given(number) for number in range(3))
    assert index.dtype in INTEGERS and data.dtype == new.dtype, f"scatter of {new.dtype} into {data.dtype}"
    if layer.mode.name == "ELEMENT":
        assert index.shape == new.shape, f"scatter of {new.shape} by {index.shape}"
        return data.scatter(layer.axis, index.long(), new)
    result = data.clone()
    result[tuple(index.long().unbind(-1))] = new
    return result


def _concatenate(layer: Layer) -> Tensor:
    tensors = [tensor.value for tensor in layer.inputs]
    _same("concatenation", *tensors)
    return torch.cat(tensors, layer.settings.get("axis", 0))


def _select(layer: Layer) -> Tensor:
    condition, one, other = (layer.given(number) for number in range(3))
    assert condition.dtype == torch.bool and condition.dim() == one.dim(), f"select by {condition.dtype}"
    _same("select", one, other)
    return torch.where(condition, one, other)


def _multiply(layer: Layer) -> Tensor:
    one, other = layer.given(0), layer.given(1)
    assert one.dtype == other.dtype and one.is_floating_point(), f"matmul of {one.dtype} and {other.dtype}"
    ops = [layer.op0.name, layer.op1.name]
    assert "VECTOR" in ops or one.dim() == other.dim(), f"matmul of ranks {one.dim()} and {other.dim()}"
    one, other = (x.mT if op == "TRANSPOSE" else x for x, op in zip((one, other), ops, strict=True))
    return one @ other


def _reduce(layer: Layer) -> Tensor:
    x, axes, keep, op = layer.given(0), _axes(layer.axes), layer.keep_dims, layer.op.name
    assert x.dtype != torch.bool, "reduction of bool"
    if op == "PROD":
        for axis in reversed(axes):
            x = x.prod(axis, keepdim=keep)
        return x
    runs: dict[str, Any] = {"SUM": torch.sum, "AVG": torch.mean, "MAX": torch.amax, "MIN": torch.amin}
    return runs[op](x, axes, keepdim=keep).to(x.dtype)


def _topk(layer: Layer) -> tuple[Tensor, Tensor]:
    """Of equal values any may come first: the last does here, so that nothing rests on their order."""
    x, (axis,), k = layer.given(0), _axes(layer.axes), layer.k
    assert x.dtype != torch.bool and k <= 3840, f"top {k} of {x.dtype}"
    flipped = x.flip(axis)
    index = flipped.sort(dim=axis, descending=layer.op.name == "MAX", stable=True).indices.narrow(axis, 0, k)
    return flipped.gather(axis, index), (x.shape[axis] - 1 - index).to(torch.int32)


def _normalize(layer: Layer) -> Tensor:
    x, scale, bias = (layer.given(number) for number in range(3))
    _same("normalization", x, scale, bias)
    axes = _axes(layer.axes)
    wide = x.float()
    mean, spread = wide.mean(axes, keepdim=True), wide.var(axes, keepdim=True, unbiased=False)
    return ((wide - mean) / (spread + layer.epsilon).sqrt()).to(x.dtype) * scale + bias


def _fill(layer: Layer) -> Tensor:
    assert layer.operation.name == "LINSPACE" and len(layer.settings["shape"]) == 1
    start = layer.given(1) if len(layer.inputs) > 1 else torch.tensor(layer.settings.get("alpha", 0))
    step = layer.given(2) if len(layer.inputs) > 2 else torch.tensor(layer.settings.get("beta", 1))
    return (start + step.flatten()[0] * torch.arange(layer.settings["shape"][0])).to(start.dtype)


def _unsqueeze(layer: Layer) -> Tensor:
    x = layer.given(0)
    for axis in sorted(layer.given(1).flatten().tolist()):
        x = x.unsqueeze(axis)
    return x


class Network:
    """Stands for tensorrt.INetworkDefinition; `examples` are the values of its inputs, in their order."""

    def __init__(self, examples: Sequence[Tensor]) -> None:
        self._examples = iter(examples)
        self._inputs: list[Layer] = []
        self._all: list[Layer] = []
        self.outputs: list[NetworkTensor] = []
        self.layers: Counter[str] = Counter()

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs for other inputs of the same shapes."""
        for layer, value in zip(self._inputs, inputs, strict=True):
            layer.value = value
        for layer in self._all:
            layer.forget()
        return [output.value for output in self.outputs]

    def get_flag(self, flag: Any) -> bool:
        return bool(flag.name == "STRONGLY_TYPED")

    def _layer(self, kind: str, run: Any, *inputs: Any, **settings: Any) -> Layer:
        self.layers[kind] += 1
        self._all.append(Layer(kind, run, *inputs, **settings))
        return self._all[-1]

    def add_input(self, name: str, dtype: Any, shape: Sequence[int]) -> NetworkTensor:
        value = next(self._examples)
        assert (_trt_dtype(value.dtype), tuple(value.shape)) == (dtype, tuple(shape)), f"input {name}: {dtype} {shape}"
        self._inputs.append(Layer("input", lambda layer: layer.value, value=value))
        tensor = self._inputs[-1].get_output(0)
        tensor.name, tensor.is_network_input = name, True
        return tensor

    def mark_output(self, tensor: NetworkTensor) -> None:
        self.outputs.append(tensor)

    def add_constant(self, shape: Sequence[int], weights: Any) -> Layer:
        value = weights.tensor() if isinstance(weights, Weights) else torch.from_numpy(np.array(weights))
        value = value.clone().reshape(tuple(shape))
        return self._layer("constant", lambda _: value)

    def add_identity(self, x: Any) -> Layer:
        return self._layer("identity", lambda layer: layer.given(0), x)

    def add_cast(self, x: Any, to: Any) -> Layer:
        return self._layer("cast", lambda layer: layer.given(0).to(DTYPES[to.name]), x)

    def add_elementwise(self, one: Any, other: Any, op: Any) -> Layer:
        return self._layer("elementwise", _elementwise, one, other, op=op)

    def add_unary(self, x: Any, op: Any) -> Layer:
        return self._layer("unary", _unary, x, op=op)

    def add_activation(self, x: Any, type: Any) -> Layer:
        return self._layer("activation", _activation, x, function=type)

    def add_shuffle(self, x: Any) -> Layer:
        return self._layer("shuffle", _shuffle, x)

    def add_unsqueeze(self, x: Any, axes: Any) -> Layer:
        return self._layer("unsqueeze", _unsqueeze, x, axes)

    def add_slice(self, x: Any, start: Any, shape: Any, stride: Any) -> Layer:
        return self._layer("slice", _slice, x, start=list(start), shape=list(shape), stride=list(stride))

    def add_gather(self, data: Any, index: Any, axis: int) -> Layer:
        mode = NetworkTensor.trt.GatherMode.DEFAULT
        return self._layer("gather", _gather, data, index, axis=axis, mode=mode)

    def add_scatter(self, data: Any, index: Any, new: Any, mode: Any) -> Layer:
        return self._layer("scatter", _scatter, data, index, new, mode=mode, axis=0)

    def add_concatenation(self, tensors: Sequence[Any]) -> Layer:
        return self._layer("concatenation", _concatenate, *tensors)

    def add_select(self, condition: Any, one: Any, other: Any) -> Layer:
        return self._layer("select", _select, condition, one, other)

    def add_matrix_multiply(self, one: Any, op0: Any, other: Any, op1: Any) -> Layer:
        return self._layer("matrix multiply", _multiply, one, other, op0=op0, op1=op1)

    def add_reduce(self, x: Any, op: Any, axes: int, keep_dims: bool) -> Layer:
        return self._layer("reduce", _reduce, x, op=op, axes=axes, keep_dims=keep_dims)

    def add_topk(self, x: Any, op: Any, k: int, axes: int, *rest: Any) -> Layer:
        return self._layer("top k", _topk, x, op=op, k=k, axes=axes)

    def add_softmax(self, x: Any) -> Layer:
        return self._layer("softmax", lambda layer: torch.softmax(layer.given(0), _axes(layer.axes)[0]), x)

    def add_normalization(self, x: Any, scale: Any, bias: Any, axes: int) -> Layer:
        return self._layer("normalization", _normalize, x, scale, bias, axes=axes, epsilon=1e-5)

    add_normalization_v2 = add_normalization

    def add_shape(self, x: Any) -> Layer:
        return self._layer("shape", lambda layer: torch.tensor(layer.given(0).shape, dtype=torch.int64), x)

    def add_fill(self, shape: Any, operation: Any, *rest: Any) -> Layer:
        return self._layer("fill", _fill, None, shape=list(shape), operation=operation)


def install(trt: Any) -> None:
    """Put these in the place of TensorRT's own, before torch-tensorrt is imported."""
    NetworkTensor.trt = trt
    for module in (trt, trt.tensorrt):
        module.ITensor, module.Weights = NetworkTensor, Weights
