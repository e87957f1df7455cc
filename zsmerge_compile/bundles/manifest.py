"""manifest.json: what a bundle holds, and the checks that it is whole and nothing else is read.

Names of files are plain paths inside the bundle; each has its length and SHA-256. The manifest is JSON and the weights
are safetensors: nothing here can run code.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zsmerge_compile.errors import BundleError, must
from zsmerge_compile.passes.insert_cache import DECODE_INPUTS, PREFILL_INPUTS
from zsmerge_compile.program import Interface, TensorSpec

NAME = "manifest.json"
WEIGHTS = "weights.safetensors"  # the file with all of them
VERSION = 2
INPUTS = {"prefill": PREFILL_INPUTS, "decode": DECODE_INPUTS}
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16, torch.int32)}
_SEAL = ',\n "sha256": "{}"\n}}\n'
_LARGEST = 64 * 2**20  # bytes of a manifest


@dataclass(frozen=True)
class Manifest:
    """format     "pt2", ...
    versions   library -> version that wrote the bundle
    model      class, vocab_size, max_positions, max_places
    policy     name, config, and the kind of its state
    cache      batch_size, dtype, and per layer the state's tensors: [name, shape, dtype], in their order, and what its
               slots are for
    chunk      columns of a prompt's chunk, None: prompts go in whole
    programs   graph -> {"file", "inputs", "weights"}: names in the order of its arguments, the state between the two
    files      path -> {"bytes", "sha256"}

    In the file a last line has the `sha256` of the text before it (`sealed`).
    """

    format: str
    versions: dict[str, str]
    model: dict[str, Any]
    policy: dict[str, Any]
    cache: dict[str, Any]
    chunk: int | None
    programs: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    version: int = VERSION

    def write(self, folder: Path) -> None:
        (folder / NAME).write_text(sealed(asdict(self)), encoding="utf-8")

    def interface(self, device: torch.device) -> Interface:
        """What the runtime must know. Raises BundleError."""
        cache, model = self.cache, self.model
        try:
            state = tuple(
                {name: TensorSpec(tuple(shape), _DTYPES[kind]) for name, shape, kind in layer}
                for layer in cache["layers"]
            )
            parts = tuple({str(name): size for name, size in layer.items()} for layer in cache["parts"])
            dtype, limits = _DTYPES[cache["dtype"]], (model["max_positions"], model["max_places"])
            rows = {spec.shape[0] for layer in state for spec in layer.values()}
            sizes = (
                cache["batch_size"],
                model["vocab_size"],
                *(size for layer in state for spec in layer.values() for size in spec.shape),
            )
            counts = (*sizes, *(limit for limit in limits if limit is not None))
            good = all(_is_count(size) for size in counts) and min(sizes[:2]) >= 1
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise _damaged("cache and model", f"{type(error).__name__}: {error}") from error
        if not good or rows != {cache["batch_size"]}:
            raise _damaged("cache and model", "sizes that are no counts, or not those of one batch")
        kind = str(self.policy.get("state"))
        return Interface(cache["batch_size"], dtype, device, model["vocab_size"], *limits, kind, parts, state)


def read(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`, every file it names present, whole and inside. Raises BundleError."""
    path = folder / NAME
    if not path.is_file():
        raise BundleError(must("bundle", f"a folder with {NAME}", str(folder), "zs.export writes one"))
    if path.stat().st_size > _LARGEST:
        raise _damaged("length", f"{path.stat().st_size} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged("text", f"no JSON ({type(error).__name__})") from error
    manifest = _checked(raw, text)
    for name, facts in manifest.files.items():
        _check_file(folder, name, facts)
    for graph, program in manifest.programs.items():
        if program["file"] not in manifest.files:
            raise _damaged(f"file of {graph}", repr(program["file"]))
    return manifest


def sealed(fields: dict[str, Any]) -> str:
    """A manifest's text, whose last line has the SHA-256 of all before it: against damage, not against ill will."""
    body = json.dumps({name: value for name, value in fields.items() if name != "sha256"}, indent=1)[:-2]
    return body + _SEAL.format(hashlib.sha256(body.encode()).hexdigest())


def _is_sealed(text: str) -> bool:
    body, _, _ = text.rpartition(_SEAL.partition("{")[0])
    return text == body + _SEAL.format(hashlib.sha256(body.encode()).hexdigest())


def inside(folder: Path, name: object) -> Path:
    """The file `name` of the bundle. Raises BundleError unless it is a plain path that stays inside."""
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        raise BundleError(must("file name in the manifest", "a plain path inside the bundle", repr(name)))
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(
            must("file name in the manifest", "a plain path inside the bundle", f"{name!r}, which leads out")
        )
    return path


def checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """`files` of every file in the folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in found}


def dtype_name(dtype: torch.dtype) -> str:
    """As the manifest spells it."""
    return next(name for name, known in _DTYPES.items() if known is dtype)


def _checked(raw: Any, text: str) -> Manifest:
    """The manifest's fields with their types. Raises BundleError."""
    if not isinstance(raw, dict) or "version" not in raw:
        raise _damaged("content", "something else")
    if raw["version"] != VERSION:
        hint = (
            "export the model again"
            if isinstance(raw["version"], int) and raw["version"] < VERSION
            else "update zsmerge-compile"
        )
        raise BundleError(must("bundle's version", VERSION, repr(raw["version"]), hint))
    kinds = dict(format=str, versions=dict, model=dict, policy=dict, cache=dict, programs=dict, files=dict)
    for field, kind in kinds.items():
        if not isinstance(raw.get(field), kind):
            raise _damaged(field, type(raw.get(field)).__name__)
    chunk = raw.get("chunk")
    if chunk is not None and not (_is_count(chunk) and chunk >= 1):
        raise _damaged("chunk", repr(chunk))
    fields = {*kinds, "chunk", "version", "sha256"}
    if set(raw) != fields:
        raise _damaged("fields", sorted(set(raw) ^ fields))
    del raw["sha256"]
    if not _is_sealed(text):
        raise BundleError(must("manifest", "what was written (SHA-256)", "other content", "copy it again"))
    if set(raw["programs"]) != {"prefill", "decode"}:
        raise _damaged("programs", sorted(raw["programs"]))
    for graph, program in raw["programs"].items():
        lists = isinstance(program, dict) and all(_is_names(program.get(field)) for field in ("inputs", "weights"))
        if not lists or set(program) != {"file", "inputs", "weights"} or not isinstance(program["file"], str):
            raise _damaged(f"program {graph}", "other fields than file, inputs and weights")
        if program["inputs"] != list(INPUTS[graph]):
            raise _damaged(f"inputs of {graph}", program["inputs"])
    return Manifest(**raw)


def _check_file(folder: Path, name: str, facts: Any) -> None:
    path = inside(folder, name)
    if not isinstance(facts, dict) or set(facts) != {"bytes", "sha256"}:
        raise _damaged(f"facts of {name}", repr(facts))
    if not path.is_file():
        raise BundleError(must(f"{name} of the bundle", "a file", "none", "copy the whole folder"))
    if path.stat().st_size != facts["bytes"]:
        raise BundleError(
            must(f"{name} of the bundle", f"{facts['bytes']} bytes long", path.stat().st_size, "copy it again")
        )
    if _digest(path) != facts["sha256"]:
        raise BundleError(must(f"{name} of the bundle", "what was written (SHA-256)", "other content", "copy it again"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _damaged(what: str, got: object) -> BundleError:
    return BundleError(must(f"manifest's {what}", f"as zs.export (version {VERSION}) writes it", got))
