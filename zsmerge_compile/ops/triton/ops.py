"""`zsmerge_triton::decode` and `zsmerge_triton::extend`: the cache ops' schemas, served by the Triton kernels.

Importing this imports triton and registers the ops. They mutate the nine state tensors, as `zsmerge::decode` and
`zsmerge::extend` do, and are opaque to a compiler.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.ops import contracts
from zsmerge_compile.ops.state import Rule, State
from zsmerge_compile.ops.triton import launch_decode, launch_extend

_SIZE = len(State._fields)


def _schema(op: Any) -> str:
    """The arguments and results of an op, without its name."""
    text = str(op._schema)
    return text[text.index("(") :]


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, so it must be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _decode(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    state, (seen, active), rule = State(*rest[:_SIZE]), rest[_SIZE : _SIZE + 2], Rule(*rest[_SIZE + 2 :])
    with _device_of(query):
        return launch_decode.decode(state, query, key, value, seen, active, rule)


def _extend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    state, (rows, seen, pads) = State(*rest[:_SIZE]), rest[_SIZE : _SIZE + 3]
    rule = Rule(*rest[_SIZE + 3 :])
    with _device_of(query):
        return launch_extend.extend(state, query, key, value, rows, seen, pads, rule)


_decode_op = torch.library.custom_op(
    "zsmerge_triton::decode", _decode, mutates_args=State._fields, schema=_schema(contracts.DECODE)
)
_extend_op = torch.library.custom_op(
    "zsmerge_triton::extend", _extend, mutates_args=State._fields, schema=_schema(contracts.EXTEND)
)
_decode_op.register_fake(contracts.like_query)
_extend_op.register_fake(contracts.like_query)

DECODE = torch.ops.zsmerge_triton.decode.default
EXTEND = torch.ops.zsmerge_triton.extend.default


def decode_step(*arguments: Any) -> Tensor:
    """A kernel for `lower/kernels.py`: one call of `zsmerge_triton::decode`, arguments as `contracts.DECODE`."""
    return DECODE(*arguments)


def extend(*arguments: Any) -> Tensor:
    """A kernel for `lower/kernels.py`: one call of `zsmerge_triton::extend`, arguments as `contracts.EXTEND`."""
    return EXTEND(*arguments)
