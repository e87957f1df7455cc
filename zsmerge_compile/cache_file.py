"""A cache's rows as one safetensors file, so that what a long document left can be kept and used again.

The file holds `seen_tokens` [b] and every state tensor [b, ...] under its name in the graphs (`layer0_key`, ...); its
metadata names the kind of state and the parts of each layer's budget. It rests on no backend, batch size or device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zsmerge_compile import tensor_file
from zsmerge_compile.errors import InputError, must
from zsmerge_compile.program import Interface, TensorSpec

KIND, VERSION = "zsmerge_compile cache", "1"
SEEN = "seen_tokens"


def write(path: str | os.PathLike[str], interface: Interface, tensors: Iterable[Tensor]) -> None:
    """seen_tokens and the state of some rows. Raises InputError where no file can be written there."""
    named = dict(zip((SEEN, *interface.state_names), tensors, strict=True))
    saved = {name: tensor.cpu().contiguous() for name, tensor in named.items()}
    try:
        target = Path(path).resolve()
        if target.is_dir() or not target.parent.is_dir():
            raise InputError(must("path", "a file in a folder that exists", str(path)))
        with TemporaryDirectory(dir=target.parent, prefix=".cache-") as folder:
            draft = Path(folder) / "draft"
            tensor_file.write(saved, draft, _metadata(interface))
            draft.replace(target)  # whole or not at all
    except InputError:
        raise
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise InputError(must("path", "one that can be written", f"{path!r}: {error}")) from error


def read(path: str | os.PathLike[str], interface: Interface, rows: int) -> list[Tensor]:
    """seen_tokens and the state of `rows` rows, on the CPU. Raises InputError for anything but such a file."""
    try:
        with safe_open(path, "pt") as file:
            _check_metadata(file.metadata() or {}, interface)
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except InputError:
        raise
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise InputError(must("saved cache", "a file that cache.save wrote", f"{path}: {error}")) from error
    specs = {SEEN: TensorSpec((rows,), torch.int64)}
    specs |= {name: TensorSpec((rows, *spec.shape[1:]), spec.dtype) for name, spec in _specs(interface)}
    if saved.keys() != specs.keys():
        raise InputError(must("tensors of the saved cache", "this cache's", sorted(saved.keys() ^ specs.keys())))
    if saved[SEEN].dim() == 1 and len(saved[SEEN]) != rows:
        raise InputError(must("saved cache", f"of {rows} rows", len(saved[SEEN]), "name the rows with rows="))
    for name, spec in specs.items():
        found = TensorSpec(tuple(saved[name].shape), saved[name].dtype)
        if found != spec:
            raise InputError(must(f"{name} of the saved cache", _told(spec), _told(found)))
    limit, seen = interface.max_positions, saved[SEEN].tolist()
    if not all(0 <= count <= (count if limit is None else limit) for count in seen):
        raise InputError(
            must("tokens seen in the saved cache", f"0 .. {'any number' if limit is None else limit}", seen)
        )
    return [saved[name] for name in specs]


def _metadata(interface: Interface) -> dict[str, str]:
    return {"kind": KIND, "version": VERSION, "policy": interface.kind, "layers": json.dumps(interface.parts)}


def _check_metadata(found: dict[str, str], interface: Interface) -> None:
    for name, expected in _metadata(interface).items():
        if found.get(name) != expected:
            raise InputError(must(f"{name} of the saved cache", repr(expected), repr(found.get(name))))


def _specs(interface: Interface) -> Iterable[tuple[str, TensorSpec]]:
    specs = (spec for layer in interface.state for spec in layer.values())
    return zip(interface.state_names, specs, strict=True)


def _told(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"
