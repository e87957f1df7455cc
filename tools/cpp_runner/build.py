"""Build the C++ runner with the PyTorch that is installed: no CMake, no CUDA toolkit."""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "cpp_runner"


def command(program: Path) -> list[str]:
    """The compiler's command line for `program`."""
    sources = [str(path) for path in sorted(HERE.glob("*.cpp"))]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    version = f'-DZSMERGE_TORCH="{torch.__version__}"'
    included = [f"-isystem{path}" for path in include_paths()]
    linked = [word for path in library_paths() for word in (f"-L{path}", "-Xlinker", "-rpath", "-Xlinker", path)]
    cuda = ["-Wl,--no-as-needed", "-ltorch_cuda", "-lc10_cuda"] if torch.version.cuda else []
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", abi, version]
    return [*compiler, *flags, *included, *sources, "-o", str(program), *linked,
            *cuda, "-ltorch", "-ltorch_cpu", "-lc10"]  # fmt: skip


def build(folder: Path = FOLDER) -> Path:
    """The program, compiled unless `folder` has it for these sources and this command (about a minute)."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(" ".join(command(Path("zsmerge-run"))).encode())
    for path in sorted(HERE.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.read_bytes())
    program, stamp = folder / "zsmerge-run", folder / "built"
    with FileLock(folder / "lock"):
        if not program.exists() or not stamp.exists() or stamp.read_text() != digest.hexdigest():
            stamp.unlink(missing_ok=True)
            done = subprocess.run(command(program), check=False)
            if done.returncode:
                raise OSError(f"exit status {done.returncode}")
            stamp.write_text(digest.hexdigest())
    return program


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/cpp_runner/build", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to put zsmerge-run (default: %(default)s)")
    try:
        print(build(parser.parse_args().folder))
    except OSError as error:
        print(f"the runner must be compiled, got {error}; CXX= names another C++20 compiler", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
