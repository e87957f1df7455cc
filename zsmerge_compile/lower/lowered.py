"""What a backend hands to the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Lowered(NamedTuple):
    """Callables with the signatures of `Program.prefill` and `Program.decode`, and which kernel runs each cache op."""

    prefill: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    kernels: dict[str, str]
