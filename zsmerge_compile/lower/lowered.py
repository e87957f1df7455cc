"""What a backend hands to the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Lowered(NamedTuple):
    """Callables with the signatures of `Program.prefill` and `Program.decode`, and what they are made of.

    kernels  cache op -> which kernel runs it
    parts    graph -> graphs compiled for it: 1 for the whole, more where alike layers were outlined, 0 uncompiled
    """

    prefill: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    kernels: dict[str, str]
    parts: dict[str, int]
