"""A standard graph (`standard.py`) as a pure function of its state, as ONNX and TensorRT need it, and with its weights.

Before:

    def forward(input_ids, seen, active, layer0_key, ...):                # writes layer0_key, ... in place
        return logits

After:

    def forward(input_ids, seen, active, layer0_key, ...):                # writes nothing
        return logits, layer0_key_out, ...

Their exporters drop such writes without a word.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zsmerge_compile.lower.standard import Graph


def functional(graph: Graph) -> Graph:
    """The graph with (inputs, state, weights) -> (logits, new state); its state is the graph's."""
    return graph._replace(module=_Functional(graph.module, len(graph.inputs), len(graph.state)))


def without_empty(graph: Graph) -> Graph:
    """The graph without state tensors of no elements (residual=0): an engine has nothing to bind them to."""
    first = len(graph.inputs)
    held = [tensor.numel() > 0 for tensor in graph.example[first:]]
    if all(held):
        return graph
    shapes = [None if keep else tensor for keep, tensor in zip(held, graph.example[first:], strict=True)]
    kept = [number for number, keep in enumerate(held) if keep]
    places = [*range(first), *(first + number for number in kept)]
    return graph._replace(
        module=_WithoutEmpty(graph.module, first, shapes),
        state=tuple(graph.state[number] for number in kept),
        example=tuple(graph.example[place] for place in places),
        dynamic=tuple(graph.dynamic[place] for place in places),
    )


class _Functional(nn.Module):
    def __init__(self, module: nn.Module, inputs: int, state: int) -> None:
        super().__init__()
        self.module, self.inputs, self.state = module, inputs, state

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        stop = self.inputs + self.state
        new = [tensor.clone() for tensor in given[self.inputs : stop]]
        return self.module(*given[: self.inputs], *new, *given[stop:]), *new


class _WithoutEmpty(nn.Module):
    """shapes: for every state tensor of `module` an example if it is empty, None if it is given."""

    def __init__(self, module: nn.Module, inputs: int, shapes: list[Tensor | None]) -> None:
        super().__init__()
        self.module, self.inputs, self._shapes = module, inputs, shapes

    def forward(self, *given: Tensor) -> Tensor:
        rest = iter(given[self.inputs :])
        state = [next(rest) if empty is None else torch.zeros_like(empty) for empty in self._shapes]
        logits: Tensor = self.module(*given[: self.inputs], *state, *rest)
        return logits


class Holding(nn.Module):
    """A graph with its weights as buffers of these names (dots make submodules), which compilers take as
    constants."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._run, self._names = [module], list(weights)  # in a list, so that it is no submodule
        for name, tensor in weights.items():
            *path, last = name.split(".")
            holder: nn.Module = self
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_buffer(last, tensor)

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self._run[0](*inputs, *(self.get_buffer(name) for name in self._names))
        return logits
