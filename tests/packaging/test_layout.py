"""The fixed top level: two links, one name for each module, and settings that keep every folder in the wheel."""

import os
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("zsmerge_compile", "passes", "models", "tests", "tools")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("name", ["passes", "models"])
def test_package_folder_is_a_relative_link_to_the_top_level_one(name: str) -> None:
    link = ROOT / "zsmerge_compile" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()


def test_nothing_imports_passes_or_models_by_their_bare_name() -> None:
    bare = re.compile(r"^\s*(?:import|from)\s+(?:passes|models)\b", re.MULTILINE)
    assert [path for path in SOURCES if bare.search(path.read_text(encoding="utf-8"))] == []


def test_pass_files_are_reachable_under_their_full_name() -> None:
    import zsmerge_compile.models
    import zsmerge_compile.passes

    for module in (zsmerge_compile.passes, zsmerge_compile.models):
        assert module.__file__ is not None
        assert Path(module.__file__).parent == ROOT / "zsmerge_compile" / module.__name__.split(".")[1]


def test_every_folder_of_modules_is_a_package() -> None:
    """`namespaces = false`: a folder without an __init__.py would be missing from the wheel."""
    folders = {path.parent for top in ("zsmerge_compile", "passes", "models") for path in (ROOT / top).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_build_settings_that_the_links_depend_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["include-package-data"] is False
    assert not any("torch" in requirement for requirement in project["build-system"]["requires"])
