"""Compile and load the C++ operators at first use, with the compiler and flags Inductor uses on this machine.

The library is kept in Inductor's cache folder under a name made of everything it depends on: the sources, the command
line, the compiler with its target, and torch. Only the first process on a machine compiles (about 15 s).
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from zsmerge_compile.errors import MissingBackendError, must

SOURCE = Path(__file__).parent / "source"
LOCK_TIMEOUT = 600.0  # seconds that one process waits for another's compilation


@functools.cache
def load() -> None:
    """Make the C++ operators callable under torch.ops. Raises MissingBackendError without a working compiler."""
    torch.ops.load_library(str(library()))
    from zsmerge_compile.ops.cpp import fakes

    fakes.register()


def library() -> Path:
    """The compiled library; compiled first if this machine has none. Raises MissingBackendError.

    It registers the operators with PyTorch's dispatcher and needs libtorch_cpu only: a C++ program may load it too.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils._filelock import FileLock

    folder = Path(cache_dir()) / "zsmerge_compile"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ops_{_key()}.so"
    if not path.exists():
        with FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT):
            if not path.exists():
                _compile(path)
    return path


def _key() -> str:
    """A name that changes with anything that changes the library."""
    digest = hashlib.sha256(f"{torch.__version__} {_command('')} {_target()}".encode())
    for file in sorted(SOURCE.glob("*.*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _target() -> str:
    """The compiler's predefined macros: its version, and every instruction set that -march=native means here."""
    words = shlex.split(_command(""))
    machine = [word for word in words if word.startswith("-m")]
    command = [words[0], *machine, "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _compile(path: Path) -> None:
    """Build beside `path`, then rename: another process sees the whole library or none."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = shlex.split(_command(folder))
        done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=False)
        if done.returncode:
            wrong = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            got = f"exit status {done.returncode}:\n" + "\n".join(wrong[:5]) + "\n"
            hint = "CXX names another compiler; C++17 and OpenMP are needed"
            raise MissingBackendError(must(f"the C++ compiler {command[0]}", "able to build the kernels", got, hint))
        os.replace(Path(folder) / "ops.so", path)


@functools.cache
def _command(folder: str) -> str:
    """Inductor's command line, run in SOURCE, that builds ops.so in `folder`."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        options = CppTorchOptions(vec_isa=pick_vec_isa(), warning_all=False, aot_mode=True)
    except InvalidCxxCompiler as error:
        hint = "install one (Debian, Ubuntu: apt install g++; conda: conda install gxx) or name it by CXX"
        raise MissingBackendError(must("the C++ compiler", "g++ or clang++", "none on the PATH", hint)) from error
    return CppBuilder("ops", "zsmerge.cpp", options, folder).get_command_line()
