"""Compiling a kernel ahead of time exactly as a launch would, and reading what it needs. No GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Needs(NamedTuple):
    """What one compiled kernel takes of a multiprocessor."""

    registers: int  # of a thread
    shared: int  # bytes of a block
    spills: int  # LDL and STL instructions
    wide_loads: int  # 128-bit loads from global memory, asynchronous ones included
    tensor_cores: int  # matrix multiply instructions


@contextmanager
def recording(modules: tuple[Any, ...]) -> Iterator[list[Launch]]:
    """Launches of the modules' `*_kernel`s are noted, in the list that this yields, instead of made."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **keywords: launches.append(Launch(self.kernel, arguments, keywords))

    found = [(m, n, k) for m in modules for n, k in vars(m).items() if n.endswith("_kernel")]
    try:
        for module, name, kernel in found:
            setattr(module, name, Recorder(kernel))
        yield launches
    finally:
        for module, name, kernel in found:
            setattr(module, name, kernel)


def compile_for(launch: Launch, arch: int) -> Any:
    """The compiled kernel, its arguments specialised as Triton's own launcher does (16-divisible, equal to 1)."""
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.arguments, strict=False))
    options = {name: value for name, value in launch.keywords.items() if name in OPTIONS}
    given |= {name: value for name, value in launch.keywords.items() if name not in OPTIONS}
    fixed = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(names):
        value = given[name]
        if name in fixed or value is None or (type(value) is int and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
        else:
            signature[name] = "fp32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def needs(compiled: Any) -> Needs:
    """Read with the cuobjdump that Triton brings along; Triton's own figures need a driver."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(option: str, path: str) -> str:
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = dump("--dump-resource-usage", file.name), dump("--dump-sass", file.name)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return Needs(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        shared=compiled.metadata.shared,
        spills=count(r"\b(?:LDL|STL)\b"),
        wide_loads=count(r"\b(?:LDG|LDGSTS)\.\S*128"),
        tensor_cores=count(r"\b(?:HMMA|HGMMA|WARPGROUP\.ARRIVE)\b"),
    )
