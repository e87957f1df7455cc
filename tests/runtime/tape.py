"""A stand-in for a CUDA graph on the CPU: it remembers calls and the memory they read and wrote, and does them again.

Like a graph it knows nothing of the Python that made the calls. A step that puts another tensor in the place of one of
its buffers goes on with the old one here, and one that asks for a value on the host cannot be recorded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zsmerge_compile.runtime.graphs import Recording


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host asks for a value while a step is recorded")
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def record(run: Callable[[], Tensor]) -> Recording:
    """A recorder: one run to warm up, one on the tape. As after a capture, the output holds nothing yet."""
    run()
    with Tape() as tape:
        output = run()
    return Recording(tape.replay, output.fill_(torch.nan))
