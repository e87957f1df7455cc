"""What compiling did, for people and for tests."""

from __future__ import annotations

from dataclasses import dataclass

from zsmerge_compile.ops.policy import Site
from zsmerge_compile.ops.state import LayerLayout


@dataclass(frozen=True)
class Report:
    """The facts of one `compile` call.

    passes           graph ("prefill", "decode") -> pass -> rewrites
    sites, layouts   one per attention layer
    cache_bytes      bytes of the cache for `batch_size` rows, of both sets of its tensors where a step needs two
    compile_seconds  tracing, passes, lowering and recording the step together
    kernels          cache op -> what runs it; "step" -> "one CUDA graph", "called directly", ...
    parts            graph -> graphs compiled for it: 1 for the whole, more where alike layers are compiled once
    """

    model: str
    policy: str
    backend: str
    batch_size: int
    passes: dict[str, dict[str, int]]
    sites: tuple[Site, ...]
    layouts: tuple[LayerLayout, ...]
    cache_bytes: int
    compile_seconds: float
    kernels: dict[str, str]
    parts: dict[str, int]
