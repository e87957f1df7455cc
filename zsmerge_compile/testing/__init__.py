"""Proof for users and for our own tests: the list-based oracle, and `check_equivalence`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsmerge_compile.errors import EquivalenceError as EquivalenceError
    from zsmerge_compile.testing.check import check_equivalence as check_equivalence
    from zsmerge_compile.testing.oracle import Oracle as Oracle
    from zsmerge_compile.testing.report import EquivalenceReport as EquivalenceReport

_HOME = {
    "check_equivalence": "zsmerge_compile.testing.check",
    "EquivalenceReport": "zsmerge_compile.testing.report",
    "EquivalenceError": "zsmerge_compile.errors",
    "Oracle": "zsmerge_compile.testing.oracle",
}
__all__ = ["EquivalenceError", "EquivalenceReport", "Oracle", "check_equivalence"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
