"""Format "aoti": two AOTInductor packages, machine code for the kind of device and processor that wrote them.

A package takes the state as inputs that it writes in place, so prompts and tokens share one cache. It holds no weights:
they are constants of its program whose memory the loader gives it (user-managed), the same for both packages. Python
and C++ (`AOTIModelPackageLoader`, `tools/cpp_runner`) load it alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from zsmerge_compile.errors import BundleError, must
from zsmerge_compile.lower.functional import Holding
from zsmerge_compile.lower.standard import Graph, exported

SUFFIX = ".pt2"
OPTIONS = {"aot_inductor.package_constants_in_so": False}


def write(graph: Graph, weights: dict[str, Tensor], path: Path) -> None:
    """The graph compiled, as a package at `path`."""
    program = exported(graph, weights, Holding(graph.module, {name: weights[name] for name in graph.weights}))
    bind_sizes(program)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=OPTIONS)


def read(
    path: Path, inputs: Sequence[str], state: Sequence[tuple[str, Tensor]], weights: Mapping[str, Tensor]
) -> Callable[..., Tensor]:
    """(inputs, state) -> logits, the state written in place. Raises BundleError.

    The package reads `weights` where they lie. Tiny ones may be numbers in its code: it asks for no others.
    """
    try:
        run = torch._inductor.aoti_load_package(str(path))
        asks = run.get_constant_fqns()
        missing = sorted(set(asks) - set(weights))
        if not missing:
            given = {name: _borrowed(weights[name]) for name in asks}
            run.load_constants(given, check_full_update=True, user_managed=True)
    except Exception as error:
        raise BundleError(must(path.name, "a package for this machine", f"{type(error).__name__}: {error}")) from error
    if missing:
        raise BundleError(must(path.name, "a package for the manifest's weights", f"one with {missing[0]!r}"))

    return _Package(run, weights)


class _Package:
    """A loaded package with the weights it reads: it must not outlive them."""

    def __init__(self, run: Callable[..., Tensor], weights: Mapping[str, Tensor]) -> None:
        self._run, self._weights = run, weights

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._run(*inputs)


def _borrowed(tensor: Tensor) -> Tensor:
    """The same memory, not held: PyTorch's loader never lets go of a user-managed constant, even when it is gone."""
    storage = tensor.untyped_storage()
    alias = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        alias, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def bind_sizes(program: torch.export.ExportedProgram) -> None:
    """Give every scan the sizes of the prompt as operands.

    Inductor allocates what a loop stacks by formulas of the prompt's rows and columns, and looks for those among the
    loop's operands. Does not fire where the graph has no scan.
    """
    gm, first = program.graph_module, program.graph_signature.user_inputs[0]
    ids = next(node for node in gm.graph.find_nodes(op="placeholder") if node.name == first)
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
