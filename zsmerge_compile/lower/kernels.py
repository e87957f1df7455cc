"""The seam for kernels: which implementation of a cache op a compiled graph calls, chosen by op and device.

A kernel is a Python function of tensors with the op's arguments, traced into the graph that is compiled. An op with
no entry stays one opaque call. The choice is never silent: `CompiledModel.report.kernels` names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from zsmerge_compile.ops import contracts, decode
from zsmerge_compile.ops.state import State


class Kernel(NamedTuple):
    """A traceable implementation and its name in reports."""

    name: str
    run: Callable[..., Tensor]


def decode_step(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """`zsmerge::decode` as the functional step plus one `index_put_` per buffer."""
    size = len(State._fields)
    seen, active = rest[size : size + 2]
    return decode.step(State(*rest[:size]), query, key, value, seen, active, contracts.rule_of(*rest[size + 2 :]))


_KERNELS: dict[tuple[Any, str], Kernel] = {
    (contracts.DECODE, "cpu"): Kernel("ops.decode (in place, one index_put_ per buffer)", decode_step),
    (contracts.DECODE, "cuda"): Kernel("ops.decode (in place, one index_put_ per buffer)", decode_step),
}


def choose(op: Any, device_type: str) -> Kernel | None:
    """The kernel for `op` on a kind of device, or None: the op is called as it is."""
    return _KERNELS.get((op, device_type))
