"""torch-tensorrt where neither TensorRT's libraries nor a GPU are: its registry, lowering and partitioner, no engines.

TensorRT's Python bindings are the real ones; the libraries behind them are stubs of nine symbols, built here with gcc.
It changes internals of the process it runs in, so it is for a process of its own. For torch-tensorrt 2.13.0.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_STUB = r"""
static void *none(void) { return 0; }
static void *table[256];
static void **object = table;
__attribute__((constructor)) static void fill(void) { for (int i = 0; i < 256; i++) table[i] = (void *)none; }
#define NONE(name) void *name(void) { return 0; }
NONE(createInferBuilder_INTERNAL) NONE(createInferRefitter_INTERNAL) NONE(createInferRuntime_INTERNAL)
NONE(createNvOnnxParser_INTERNAL) NONE(createNvOnnxParserRefitter_INTERNAL)
void *getBuilderPluginRegistry(void) { return &object; }
void *getPluginRegistry(void) { return &object; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void *logger, const char *name) { return 1; }
"""


class _Properties:
    name, major, minor, total_memory, multi_processor_count = "none", 9, 0, 1 << 37, 132


def load(parts: Path, prepare: Any = None) -> Any:
    """The module torch_tensorrt of the folder `parts`; prepare(tensorrt_bindings) is called before it is imported."""
    sys.path.insert(0, str(parts))
    _stub_libraries()
    import tensorrt_bindings

    sys.modules["tensorrt"] = tensorrt_bindings
    if prepare is not None:
        prepare(tensorrt_bindings)
    _pretend_a_gpu()
    isfile = os.path.isfile
    os.path.isfile = lambda path: False if "libtorchtrt" in str(path) else isfile(path)  # type: ignore[assignment]
    try:
        import torch_tensorrt
    finally:
        os.path.isfile = isfile
    to = torch_tensorrt.Device.to
    torch_tensorrt.Device.to = lambda self, kind: torch.device("cpu") if kind is torch.device else to(self, kind)
    return torch_tensorrt


def _stub_libraries() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "stub.c"
        source.write_text(_STUB)
        for name in ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"):
            made = Path(folder) / name
            subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", made, source], check=True)
            ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)


def _pretend_a_gpu() -> None:
    cuda: Any = torch.cuda
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = object  # type: ignore[misc,assignment]
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.current_device = torch.accelerator.current_device_index = lambda: 0  # type: ignore[assignment]
    cuda.get_device_properties = lambda *_: _Properties()
    cuda.mem_get_info = lambda *_: (1 << 36, 1 << 37)
    cuda.synchronize = cuda.empty_cache = lambda *_: None
