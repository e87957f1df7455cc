"""Importing the package is cheap, and its layers import downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "zsmerge_compile"
EXTRAS = ("triton", "tensorrt", "torch_tensorrt", "onnx", "onnxruntime", "onnxscript", "matplotlib")


def _in_fresh_process(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_touches_no_extra_and_no_cuda() -> None:
    code = (
        "import sys, zsmerge_compile\n"
        f"print([name for name in {EXTRAS} if name in sys.modules])\n"
        "torch = sys.modules.get('torch')\n"
        "print(torch is not None and torch.cuda.is_initialized())"
    )
    assert _in_fresh_process(code).splitlines() == ["[]", "False"]


def test_help_of_the_command_line_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from zsmerge_compile.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    assert _in_fresh_process(code).splitlines()[-1] == "False"


def _imports(path: Path) -> set[str]:
    """Every zsmerge_compile module a file names in an import, at any depth; names inside a module count as it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; imports are always by their full name"
            found |= {_module(node.module or "", alias.name) for alias in node.names}
    return {name for name in found if name.split(".")[0] == "zsmerge_compile"}


def _module(package: str, name: str) -> str:
    """`from a.b import c`: a.b.c when c is a file or folder of a.b, else a.b."""
    path = ROOT.joinpath(*package.split("."), name)
    return f"{package}.{name}" if path.with_suffix(".py").exists() or path.is_dir() else package


# folder -> what its files may import, besides themselves
MAY_IMPORT = {
    "zsmerge_compile/ops": {"errors"},
    "passes": {"errors", "ops", "models.spec"},
    "zsmerge_compile/runtime": {"cache", "config", "errors", "ops", "program", "models.spec", "lower.lowered"},
}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_layer_imports_only_what_lies_below(folder: str) -> None:
    own = "zsmerge_compile." + folder.removeprefix("zsmerge_compile/")
    allowed = [own, *(f"zsmerge_compile.{name}" for name in MAY_IMPORT[folder])]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in _imports(path)
        if not any(name == module or name.startswith(module + ".") for module in allowed)
    ]
    assert wrong == []


def test_only_the_front_imports_api() -> None:
    files = [path for top in ("zsmerge_compile", "passes", "models") for path in (ROOT / top).rglob("*.py")]
    callers = {path.relative_to(ROOT).as_posix() for path in files if "zsmerge_compile.api" in _imports(path)}
    front = ("zsmerge_compile/__init__.py", "zsmerge_compile/cli/", "zsmerge_compile/testing")
    assert [caller for caller in callers if not caller.startswith(front)] == []
