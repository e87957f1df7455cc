"""The layer shapes that the kernels are compiled and tuned for, by name. Imports neither torch nor triton."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One model's attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    alibi: bool = False


SHAPES = {
    "LLaMA-2-7B": Shape(32, 32, 128),
    "LLaMA-3-8B": Shape(32, 8, 128),
    "Mistral-7B": Shape(32, 8, 128, window=4096),
    "Falcon-7B": Shape(71, 1, 64),
    "Falcon-40B": Shape(128, 8, 64),
    "Falcon-RW-1B": Shape(32, 32, 64, alibi=True),
    "head-dim-256": Shape(8, 1, 256),
}
KERNELS = ("split", "finish", "rows", "columns", "segments", "absorb", "gather")
