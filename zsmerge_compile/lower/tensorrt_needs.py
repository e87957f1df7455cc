"""What TensorRT needs of a machine, told in one sentence where something is missing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from zsmerge_compile.errors import MissingBackendError, must

INSTALL = 'pip install "zsmerge-compile[tensorrt]"'
BUILD, RUN = ("torch_tensorrt", "tensorrt"), ("tensorrt",)


def missing(needed: tuple[str, ...] = BUILD) -> str | None:
    """Why engines cannot be built (or, with `RUN`, only be run) here, in one sentence; None if they can."""
    for name in needed:
        if find_spec(name) is None:
            return must("TensorRT", "installed", f"an environment without {name}", INSTALL)
    if not torch.cuda.is_available():
        got = f"none that torch {torch.__version__} can use"
        return must("TensorRT's machine", "one with an NVIDIA GPU and its driver", got, "run it on such a machine")
    for name in needed:
        try:
            import_module(name)
        except Exception as error:  # a missing library, driver or symbol: each raises what it likes
            told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}"
            return must(f"import {name}", "possible", told, INSTALL)
    return None


def require(needed: tuple[str, ...] = BUILD) -> None:
    """Raises MissingBackendError with what `missing` says."""
    told = missing(needed)
    if told is not None:
        raise MissingBackendError(told)


def on(device: torch.device) -> AbstractContextManager[object]:
    """TensorRT works on the current device: in this context that is `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def library(name: str) -> Any:
    """The module, where `require` has passed."""
    return import_module(name)
