"""Whether a pt2 archive can be read without running anything: looked at before torch.export.load sees it.

torch.export.load falls back to unsafe unpickling for sample inputs, for weights and constants marked `use_pickle` and
for custom objects, evaluates the text of symbolic sizes, and finds what a node calls by its name in torch. So an
archive may hold only the members below, no pickle, no size expression that is more than arithmetic, and no call but of
operators.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zsmerge_compile.errors import BundleError, must

_MEMBERS = re.compile(
    r"[^/]+/(models/model\.json|data/(weights/model_weights_config|constants/model_constants_config)\.json"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)|\.format_version|\.storage_alignment)"
)
_EMPTY = re.compile(r"[^/]+/data/sample_inputs/[^/]+\.pt")  # torch.export.load wants it, and reads none of 0 bytes
_WORDS = (
    "Symbol|Integer|Add|Mul|Pow|Max|Min|FloorDiv|CeilDiv|CleanDiv|Mod|PythonMod|Equality|Unequality|LessThan|GreaterThan"
    "|StrictLessThan|StrictGreaterThan|And|Or|Not|positive|nonnegative|integer|True|False|true|false"
)
_ARITHMETIC = re.compile(rf"(?:\b(?:{_WORDS})\b|'[su]\d+'|\b[su]?\d+\b|[-+*/(),=\s])*")
_SIZES = "add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge|getitem|and_|or_"
_TARGET = re.compile(
    rf"torch\.ops\.(?:aten|prims)\.\w+\.\w+|torch\.ops\.higher_order\.scan|_operator\.(?:{_SIZES})|torch\.sym_(?:max|min|not)"
)
_LARGEST = 2**31  # bytes of one unpacked member


def check(path: Path) -> None:
    """Raises BundleError unless the archive at `path` is one that `write` could have made."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_member(archive, member)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(must(f"{path.name}", "a pt2 archive", f"{type(error).__name__}: {error}")) from error


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    name = member.filename
    if _EMPTY.fullmatch(name):
        if member.file_size:
            raise BundleError(
                must(f"{name} in the archive", "empty", f"{member.file_size} bytes, which would be unpickled")
            )
        return
    if not _MEMBERS.fullmatch(name):
        raise BundleError(must("member of the archive", "one that zs.export writes", repr(name)))
    if member.file_size > _LARGEST:
        raise BundleError(must(f"{name} in the archive", f"at most {_LARGEST} bytes", member.file_size))
    if name.endswith(".json"):
        _check_json(name, json.loads(archive.read(member)))


def _check_json(name: str, content: Any) -> None:
    for key, value in _fields(content):
        if key == "use_pickle" and value is not False:
            raise BundleError(must(f"use_pickle in {name}", "false", repr(value)))
        if key == "expr_str" and not (isinstance(value, str) and _ARITHMETIC.fullmatch(value)):
            raise BundleError(must(f"size expression in {name}", "arithmetic", repr(value)))
        if key == "target" and not (isinstance(value, str) and _TARGET.fullmatch(value)):
            raise BundleError(must(f"operator in {name}", "one of PyTorch's own", repr(value)))


def _fields(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON."""
    waiting = [content]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from found.items()
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(found)
