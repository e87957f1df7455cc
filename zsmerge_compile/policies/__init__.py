"""Cache policies by name: which tokens a cache of fixed size keeps. One file each; README.md says how to add one.

compiled = zs.compile(model, zs.policy("h2o", budget=1024))
"""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from typing import Any

from zsmerge_compile.config import ZSMergeConfig, plain
from zsmerge_compile.errors import ConfigError, must
from zsmerge_compile.ops.policy import CachePolicy

# Name -> the file in this folder whose `make` builds it. ZeroMerge is an earlier name of ZSMerge.
_FILES = {file.name: file.name for file in iter_modules(__path__)} | {"zeromerge": "zsmerge"}


def names() -> tuple[str, ...]:
    """The names that `policy` knows, sorted."""
    return tuple(sorted(_FILES))


def policy(name: str, **parameters: Any) -> CachePolicy:
    """The policy of that name; `parameters` are those of its file's `make`. Raises ConfigError."""
    if not isinstance(name, str) or name not in _FILES:
        raise ConfigError(must("policy", f"one of {', '.join(names())}", repr(name)))
    make = import_module(f"zsmerge_compile.policies.{_FILES[name]}").make
    known = signature(ZSMergeConfig if _FILES[name] == "zsmerge" else make)
    try:
        known.bind(**parameters)
    except TypeError as error:  # one that it does not have, or that it needs
        got = str(error).removeprefix("got ")
        raise ConfigError(must(f"parameters of {name}", ", ".join(known.parameters), got)) from None
    made: CachePolicy = make(**{name: plain(value) for name, value in parameters.items()})
    return made


def policy_of(config: ZSMergeConfig | CachePolicy) -> CachePolicy:
    """The policy itself, or the one that a ZSMergeConfig stands for."""
    if isinstance(config, ZSMergeConfig):
        return import_module("zsmerge_compile.policies.zsmerge").ZSMergePolicy(config)
    return config
