"""Where these tests run: on the GPU if there is one, else in Triton's interpreter, on CPU tensors.

The interpreter is chosen when triton is imported, for the whole of that copy of triton, and other tests (Inductor's)
import triton too, by then or later. So the kernels get a copy of their own, imported under TRITON_INTERPRET=1, and
everybody else keeps, or gets, the ordinary one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

import torch


def _triton_modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "triton"}


def _import_interpreted() -> None:
    """Import the kernels bound to an interpreted triton, and leave `sys.modules` and the environment as they were."""
    ordinary, setting = _triton_modules(), os.environ.get("TRITON_INTERPRET")
    for name in ordinary:
        if not name.startswith("triton._C"):  # the compiled part is the same for both, and can be loaded once only
            del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("zsmerge_compile.ops.triton.ops")
    finally:
        compiled = {name: module for name, module in _triton_modules().items() if name.startswith("triton._C")}
        for name in _triton_modules():
            del sys.modules[name]
        sys.modules.update(compiled | ordinary)
        if setting is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = setting


if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    _import_interpreted()
