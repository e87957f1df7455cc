"""The text: the sources of Python's standard library, split by file into training and held-out."""

import random
import sysconfig
from pathlib import Path
from typing import NamedTuple

# Tables (codecs, HTML entities) and the generated help topics are hardly code: where one of them is held out, the
# figures measure hexadecimal numbers instead.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
EXCLUDED_FILES = frozenset({"html/entities.py"})
EXCLUDED_PREFIXES = ("_sysconfigdata",)  # describes one machine's build
MIN_CHARS = 1_000
HELD_OUT_SHARE = 0.05


class SourceFile(NamedTuple):
    name: str  # relative to the standard library, with forward slashes
    text: str


class Split(NamedTuple):
    train: list[SourceFile]
    held_out: list[SourceFile]


def stdlib_files(root: Path | None = None) -> list[SourceFile]:
    """Every source file of at least MIN_CHARS characters under `root` (the running Python's library), by name."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        text = None if _is_excluded(relative) else _read(path)
        if text is not None and len(text) >= MIN_CHARS:
            files.append(SourceFile(relative.as_posix(), text))
    return files


def split_by_file(files: list[SourceFile], seed: int) -> Split:
    """A seeded split in which no file lies on both sides; HELD_OUT_SHARE of the files are held out."""
    shuffled = list(files)
    random.Random(seed).shuffle(shuffled)
    count = max(1, round(len(files) * HELD_OUT_SHARE))
    return Split(train=sorted(shuffled[count:]), held_out=sorted(shuffled[:count]))


def _is_excluded(relative: Path) -> bool:
    return (
        not EXCLUDED_FOLDERS.isdisjoint(relative.parts)
        or relative.as_posix() in EXCLUDED_FILES
        or relative.name.startswith(EXCLUDED_PREFIXES)
    )


def _read(path: Path) -> str | None:
    """The file's text, or None where it is not UTF-8 (a few library files are kept in other encodings)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
