"""Format "aoti": two AOTInductor packages, machine code for the kind of device and processor that wrote them.

A package takes the state as inputs that it writes in place, and the weights as inputs too, so prompts and tokens share
one cache and one copy of the weights. Python and C++ (`AOTIModelPackageLoader`) load it alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from zsmerge_compile.bundles.graphs import Graph, exported
from zsmerge_compile.errors import BundleError, must

SUFFIX = ".pt2"


def write(graph: Graph, weights: dict[str, Tensor], path: Path) -> None:
    """The graph compiled, as a package at `path`."""
    program = exported(graph, weights)
    bind_sizes(program.graph_module)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def read(
    path: Path, inputs: Sequence[str], state: Sequence[tuple[str, Tensor]], weights: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """(inputs, state) -> logits, the state written in place. Raises BundleError."""
    try:
        run = torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        raise BundleError(must(path.name, "a package for this machine", f"{type(error).__name__}: {error}")) from error

    def call(*inputs: Tensor) -> Tensor:
        logits: Tensor = run(*inputs, *weights)
        return logits

    return call


def bind_sizes(gm: fx.GraphModule) -> None:
    """Give every scan the sizes of the prompt as operands.

    Inductor allocates what a loop stacks by formulas of the prompt's rows and columns, and looks for those among the
    loop's operands. Does not fire where the graph has no scan.
    """
    ids = gm.graph.find_nodes(op="placeholder")[0]
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan):
        body, carried, sliced, others = node.args
        sizes = []
        for axis in (0, 1):
            with gm.graph.inserting_before(node):
                sizes.append(gm.graph.call_function(torch.ops.aten.sym_size.int, (ids, axis)))
            sizes[-1].meta["val"] = ids.meta["val"].shape[axis]
        _take(getattr(gm, str(body.target)), sizes)
        node.args = (body, carried, sliced, (*others, *sizes))
    gm.recompile()


def _take(body: fx.GraphModule, sizes: list[fx.Node]) -> None:
    """Placeholders for the sizes behind those the body has."""
    last = body.graph.find_nodes(op="placeholder")[-1]
    for axis, size in enumerate(sizes):
        with body.graph.inserting_after(last):
            last = body.graph.placeholder(f"prompt_size_{axis}")
        last.meta["val"] = size.meta["val"]
    body.recompile()
