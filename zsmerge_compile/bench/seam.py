"""Where the benchmarks meet the kernels: which one a program got, another one in its place, and an op by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from zsmerge_compile.lower import inductor, kernels
from zsmerge_compile.lower.kernels import Kernel
from zsmerge_compile.ops.state import LayerLayout, Rule
from zsmerge_compile.program import Program


def kernel_of(program: Program, op: Any) -> Kernel:
    """What runs `op` in this program's compiled graphs."""
    return kernels.choose(op, program)


@contextmanager
def instead(op: Any, kernel: Kernel) -> Iterator[None]:
    """Models compiled in this context run `kernel` for `op`; everything else about them stays."""
    choose = kernels.choose

    def chosen(wanted: Any, program: Program) -> Kernel:
        return kernel if wanted is op else choose(wanted, program)

    kernels.choose = chosen  # type: ignore[assignment]
    try:
        yield
    finally:
        kernels.choose = choose


def rule_alone(program: Program, layout: LayerLayout) -> Rule:
    """Of the first layer at another size, on the program's device; without ALiBi, which no benchmarked model has."""
    rule = replace(Rule(*program.policy.arguments(program.sites[0], layout)), slopes=None)
    tensors: dict[str, Any] = {
        name: value.to(program.device) for name, value in vars(rule).items() if isinstance(value, Tensor)
    }
    return replace(rule, **tensors)


def compile_alone(kernel: Kernel, tensors: tuple[Tensor, ...], constants: tuple[Any, ...]) -> Callable[..., Tensor]:
    """A kernel lowered as in a model's graph, with nothing around it: a function of the tensors.

    Tensors among the constants are inputs of the graph, as buffers are.
    """
    own = [constant for constant in constants if isinstance(constant, Tensor)]
    with FakeTensorMode() as mode:
        fakes: list[Tensor] = [mode.from_tensor(tensor, static_shapes=True) for tensor in (*tensors, *own)]

    def body(*given: Tensor) -> tuple[Tensor]:
        buffers = iter(given[len(tensors) :])
        rule = [next(buffers) if isinstance(constant, Tensor) else constant for constant in constants]
        return (kernel.run(*given[: len(tensors)], *rule),)

    with mode, torch.no_grad():
        graph = make_fx(body)(*fakes)
    run = inductor.compile_graph(graph, fakes)

    @torch.no_grad()
    def call(*given: Tensor) -> Tensor:
        out: Tensor = run(*given, *own)[0]
        return out

    return call
