"""A graph of calls (`passes/outline_layers.py`) as a plain list of them, run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx

from zsmerge_compile.passes.graph import attribute


class Stage(NamedTuple):
    """One call: where its arguments lie, where its results go, and which places nobody reads afterwards."""

    run: Callable[..., Any]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    frees: tuple[int, ...]


class Stages:
    """Calls the compiled parts of an outlined graph in their order, with each layer's weights and state.

    A value is let go as soon as the last part that reads it has run, so that memory does not grow with the layers.
    """

    def __init__(self, outlined: fx.GraphModule, parts: Mapping[str, Callable[..., Any]]) -> None:
        graph = outlined.graph
        held = [node for op in ("placeholder", "get_attr") for node in graph.find_nodes(op=op)]
        place = {node: number for number, node in enumerate(held)}
        calls = graph.find_nodes(op="call_module")
        results = {call: sorted(call.users, key=lambda item: int(item.args[1])) for call in calls}
        for item in (item for call in calls for item in results[call]):
            place[item] = len(place)
        self._constants = [attribute(outlined, str(node.target)) for node in graph.find_nodes(op="get_attr")]
        self._scratch: list[Tensor | None] = [None] * (len(place) - len(held))
        self._output = place[graph.output_node().args[0]]
        last = {item: call for call in calls for item in call.all_input_nodes if item not in held}
        self._stages = [
            Stage(
                parts[str(call.target)],
                tuple(place[used] for used in call.args),
                tuple(place[item] for item in results[call]),
                tuple(place[item] for item, reader in last.items() if reader is call),
            )
            for call in calls
        ]

    def __call__(self, *inputs: Tensor) -> Tensor:
        held: list[Any] = [*inputs, *self._constants, *self._scratch]
        for run, takes, gives, frees in self._stages:
            results = run(*[held[place] for place in takes])
            for place, result in zip(gives, results, strict=True):
                held[place] = result
            del results
            for place in frees:
                held[place] = None
        output: Tensor = held[self._output]
        return output
