"""Format "pt2": two programs that torch.export.load reads, on any machine with PyTorch; run node by node.

The archives hold graphs only. Weights are inputs: they lie once in the bundle's safetensors, and once in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from zsmerge_compile.bundles import archive
from zsmerge_compile.errors import BundleError, must
from zsmerge_compile.lower.standard import Graph, exported

SUFFIX = ".pt2"


def write(graph: Graph, weights: dict[str, Tensor], path: Path) -> None:
    """The graph's program as an archive at `path`."""
    program = exported(graph, weights)
    program._example_inputs = None  # they would be pickled
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, path)
    archive.check(path)


def read(
    path: Path, inputs: Sequence[str], state: Sequence[tuple[str, Tensor]], weights: Mapping[str, Tensor]
) -> Callable[..., Tensor]:
    """(inputs, state) -> logits, the state written in place. Raises BundleError.

    It is called with the inputs, the state and the weights, and must have been made for such ones.
    """
    archive.check(path)
    try:
        program = torch.export.load(path)
        takes = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
        run = program.module(check_guards=False)
    except Exception as error:  # torch raises a dozen unrelated types for a damaged program
        raise BundleError(
            must(path.name, "a program that torch.export.load reads", f"{type(error).__name__}: {error}")
        ) from error

    made_for = [(tuple(t.shape), t.dtype) for t in takes[len(inputs) :]]
    given = [(tuple(t.shape), t.dtype) for t in (*(tensor for _, tensor in state), *weights.values())]
    if made_for != given:
        raise BundleError(must(path.name, "a program for the manifest's cache and weights", "one for others"))

    held = tuple(weights.values())

    def call(*inputs: Tensor) -> Tensor:
        logits: Tensor = run(*inputs, *held)
        return logits

    return call
