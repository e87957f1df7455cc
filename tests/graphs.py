"""Small graphs for tests of passes: traced functions, and captured tiny models that may be rewritten at will."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.models_zoo import tiny
from zsmerge_compile.capture import Captured, capture, functional, plain
from zsmerge_compile.models.registry import spec_for
from zsmerge_compile.models.spec import ModelSpec
from zsmerge_compile.passes.graph import PassContext, aten_name


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def trace(function: Callable[..., Tensor] | nn.Module, *example: Tensor, dynamic: bool = False) -> fx.GraphModule:
    """The functional graph of `function` for these inputs: of these sizes, or of any first two if `dynamic`."""
    module = function if isinstance(function, nn.Module) else _Function(function)
    dim = torch.export.Dim
    shapes = tuple({0: dim("batch", min=1), 1: dim("length", min=1)} for _ in example) if dynamic else None
    with torch.no_grad():
        return plain(functional(torch.export.export(module, example, dynamic_shapes=shapes, strict=False)))


@cache
def _captured(name: str, attn: str, dtype: torch.dtype, layers: int) -> tuple[Any, ModelSpec, Captured]:
    model = tiny(name, dtype, attn, num_hidden_layers=layers)
    spec = spec_for(model)
    return model, spec, capture(model, spec, batch_size=3)


def captured(
    name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, layers: int = 1
) -> tuple[Any, PassContext, Captured]:
    """A tiny model, the context of its passes, and fresh copies of its graphs (decode for batch 3)."""
    model, spec, graphs = _captured(name, attn, dtype, layers)
    prefill, decode = (fx.GraphModule(gm, copy.deepcopy(gm.graph)) for gm in (graphs.prefill, graphs.decode))
    return model, PassContext(spec), Captured(prefill, decode)


def context(
    layers: int = 1, windows: tuple[int | None, ...] | None = None, max_positions: int | None = None
) -> PassContext:
    """A context for a graph that comes from no registered model."""

    def call(*_: Any) -> Tensor:
        raise NotImplementedError

    return PassContext(ModelSpec("test", layers, 128, max_positions, windows or (None,) * layers, call))


def count(gm: fx.GraphModule, name: str) -> int:
    """How many calls of the aten op `name` the graph holds, whatever the overload."""
    return sum(aten_name(node) == name for node in gm.graph.nodes)


def attentions(gm: fx.GraphModule) -> list[fx.Node]:
    """The canonical attention calls of the graph."""
    return list(gm.graph.find_nodes(op="call_function", target=torch.ops.zsmerge.attention.default))
