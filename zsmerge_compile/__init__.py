"""zsmerge_compile: a Hugging Face causal LM with a KV cache that never grows, compiled.

    import zsmerge_compile as zs
    compiled = zs.compile(model, zs.ZSMergeConfig(budget=1024))
    out = compiled.generate(input_ids, max_new_tokens=100)

Importing this package imports neither transformers nor a backend; the names below load what they need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsmerge_compile import testing as testing
    from zsmerge_compile.api import compile as compile
    from zsmerge_compile.api import new_cache as new_cache
    from zsmerge_compile.bundles.export import export as export
    from zsmerge_compile.bundles.load import load as load
    from zsmerge_compile.config import ZSMergeConfig as ZSMergeConfig
    from zsmerge_compile.errors import ZSMergeError as ZSMergeError
    from zsmerge_compile.policies import policy as policy
    from zsmerge_compile.runtime.model import CompiledModel as CompiledModel

__version__ = "0.1.0"

_HOME = {
    "compile": "zsmerge_compile.api",
    "export": "zsmerge_compile.bundles.export",
    "new_cache": "zsmerge_compile.api",
    "load": "zsmerge_compile.bundles.load",
    "ZSMergeConfig": "zsmerge_compile.config",
    "ZSMergeError": "zsmerge_compile.errors",
    "policy": "zsmerge_compile.policies",
    "CompiledModel": "zsmerge_compile.runtime.model",
}
__all__ = [
    "CompiledModel",
    "ZSMergeConfig",
    "ZSMergeError",
    "compile",
    "export",
    "load",
    "new_cache",
    "policy",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module("zsmerge_compile.testing")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
