"""Values in an exported program that rest on no input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx


class Constants:
    """Evaluates nodes of one program; what they read of its buffers counts as constant."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        held = {**program.state_dict, **program.constants}
        signature = program.graph_signature
        named = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        self._held = {node: held[name] for node, name in named.items() if name in held}
        self._known: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """A tensor, or None where an input has a part in it."""
        if node not in self._known:
            self._known[node] = None
            if node.op == "placeholder":
                self._known[node] = self._held.get(node.name)
            elif node.op == "call_function" and all(self.value(used) is not None for used in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._known.__getitem__)
                with torch.no_grad():
                    self._known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._known[node]


def is_arange(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape counts 0, 1, 2, ..."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        return False
    return torch.equal(value.flatten().cpu(), torch.arange(value.numel()))
