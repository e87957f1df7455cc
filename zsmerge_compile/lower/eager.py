"""No compilation: the graphs run node by node, the cache ops by their eager reference."""

from __future__ import annotations

from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.program import Program


def lower(program: Program) -> Lowered:
    """The program's graphs as they are."""
    kernels = {"decode": "ops.reference (eager)", "extend": "ops.prefill (eager, SDPA)"}
    return Lowered(program.prefill, program.decode, kernels, {"prefill": 0, "decode": 0})
