"""What is no bundle is refused in words, and a hostile one runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zsmerge_compile as zs
from tests.bundles.made import bundle, compiled, copy, greedy
from zsmerge_compile.bundles import manifest
from zsmerge_compile.errors import BundleError

# More, and others: MUTANTS=5000 SEED=1 tools/test -k mutant
MUTANTS = int(os.environ.get("MUTANTS", "320"))
SEED = int(os.environ.get("SEED", "0"))


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The folder with its manifest changed."""
    path = folder / manifest.NAME
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(manifest.sealed(raw))
    return folder


def signed(folder: Path) -> Path:
    """The folder with checksums that fit what now lies in it: not even these protect a hostile bundle."""
    return edited(folder, lambda raw: raw.update(files=manifest.checksums(folder)))


def rewritten(folder: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None) -> Path:
    """The folder with the members of decode.pt2 changed and more added, signed."""
    path = folder / "decode.pt2"
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return signed(folder)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def same(name: str, content: bytes) -> bytes:
    return content


def model_json(old: str, new: str) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/decode.json") and not name.endswith("models/model.json"):
            return content
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return change


def test_a_hostile_pickle_is_never_read(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickled = pickle.dumps(Bomb(mark))
    pickle.loads(pickled)
    assert mark.exists(), "the bomb works"
    mark.unlink()

    def as_sample(name: str, content: bytes) -> bytes:
        return pickled if "sample_inputs" in name else content

    def as_weight(name: str, content: bytes) -> bytes:
        entry = {"config": {"w": {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}}}
        return json.dumps(entry).encode() if name.endswith("model_weights_config.json") else content

    places: dict[str, tuple[Callable[[str, bytes], bytes], dict[str, bytes]]] = {
        "sample": (as_sample, {}),
        "weight": (as_weight, {"decode/data/weights/weight_0": pickled}),
        "flag": (as_weight, {}),
        "object": (same, {"decode/data/constants/custom_obj_0": pickled}),
        "constant": (same, {"decode/data/constants/tensor_0": pickled}),
        "second": (same, {"decode/data/sample_inputs/other.pt": pickled}),
        "text": (model_json("torch.ops.aten.embedding.default", "torch.os.system"), {}),
        "module": (model_json("torch.ops.aten.embedding.default", "torch.hub.load"), {}),
    }
    for place, (change, extra) in places.items():
        (tmp_path / place).mkdir()
        folder = rewritten(copy(bundle("llama-gqa", "pt2", 1), tmp_path / place), change, extra)
        with pytest.raises(BundleError, match="archive|operator|use_pickle"):
            zs.load(folder)
        assert not mark.exists(), place


def test_a_size_expression_is_arithmetic(tmp_path: Path) -> None:
    from zsmerge_compile.bundles import archive

    mark = tmp_path / "mark"
    for text in (
        f"open({str(mark)!r}, 'w')",
        "__import__('os')",
        "Symbol('s0').__class__",
        "lambda: 1",
        "[x for x in 'a']",
    ):
        with pytest.raises(BundleError, match="size expression"):
            archive._check_json("model.json", {"a": [{"expr_str": text}]})
    archive._check_json("model.json", {"expr_str": "Mul(Integer(64), Symbol('s22', positive=True, integer=True))"})
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../b", "..", "", "a\\b", "a//b", ".hidden", "sub/.x", "a\nb"]
)
def test_names_lead_nowhere_else(name: str, tmp_path: Path) -> None:
    folder = copy(bundle("llama-gqa", "pt2", 1), tmp_path)
    (tmp_path / "secret").write_text("x")
    edited(folder, lambda raw: raw["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(BundleError, match="plain path inside the bundle"):
        zs.load(folder)


def test_a_link_out_of_the_bundle_is_refused(tmp_path: Path) -> None:
    folder = copy(bundle("llama-gqa", "pt2", 1), tmp_path)
    outside = tmp_path / "outside"
    (folder / "decode.pt2").rename(outside)
    (folder / "decode.pt2").symlink_to(outside)
    with pytest.raises(BundleError, match="leads out"):
        zs.load(folder)


def test_foreign_versions_formats_and_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(BundleError, match="bundle must be a folder with manifest.json"):
            zs.load(folder)
    folder = copy(bundle("llama-gqa", "pt2", 1), tmp_path)
    known = manifest.VERSION
    with pytest.raises(BundleError, match=f"version must be {known}, got {known + 1}; update zsmerge-compile"):
        zs.load(edited(folder, lambda raw: raw.update(version=known + 1)))
    with pytest.raises(BundleError, match="format must be one of"):
        zs.load(edited(folder, lambda raw: raw.update(version=known, format="gguf")))


def test_another_torch(tmp_path: Path) -> None:
    folder = copy(bundle("llama-gqa", "pt2", 1), tmp_path)
    with pytest.raises(BundleError, match="torch must be at least 99.1"):
        zs.load(edited(folder, lambda raw: raw["versions"].update(torch="99.1.0")))
    with pytest.raises(BundleError, match="version of torch must be a version"):
        zs.load(edited(folder, lambda raw: raw["versions"].update(torch="x")))
    zs.load(edited(folder, lambda raw: raw["versions"].update(torch="2.0.0")))
    with pytest.raises(BundleError, match="torch must be 2.0.0, with which this aoti bundle"):
        zs.load(edited(folder, lambda raw: raw.update(format="aoti")))


def test_export_refuses_before_it_writes(tmp_path: Path) -> None:
    model = compiled("llama-gqa", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for path, message in ((tmp_path / "full", "new or empty"), (tmp_path / "no" / "such", "in a folder that exists")):
        with pytest.raises(BundleError, match=message):
            zs.export(model, path)
    with pytest.raises(zs.ZSMergeError, match="format must be one of"):
        zs.export(model, tmp_path / "new", format="gguf")
    with pytest.raises(zs.ZSMergeError, match="compiled must be what zs.compile returned"):
        zs.export(model.model, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_manifest_for_another_program_is_refused(tmp_path: Path) -> None:
    """Signed again, so that only what the program itself says can tell."""
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda raw: raw["cache"].update(batch_size=2), "cache and weights|cache and model"),
        (lambda raw: raw["cache"]["layers"].pop(), "cache and weights"),
        (lambda raw: raw["cache"]["layers"][0][0][1].append(2), "cache and weights"),
        (lambda raw: raw["programs"]["decode"]["weights"].pop(), "cache and weights"),
        (lambda raw: raw["programs"]["decode"]["weights"].append("w"), "none named 'w'"),
        (lambda raw: raw["programs"].update(decode=raw["programs"]["prefill"]), "inputs"),
        (lambda raw: raw["cache"].update(device="tpu"), "device must be cpu or cuda"),
    ]
    for number, (change, message) in enumerate(changes):
        (tmp_path / str(number)).mkdir()
        folder = copy(bundle("llama-gqa", "pt2", 1), tmp_path / str(number))
        with pytest.raises(BundleError, match=message):
            zs.load(edited(folder, change))


def test_mutants_are_refused_or_right(tmp_path: Path) -> None:
    """Bytes flipped, cut off and added, files removed and swapped, manifest values replaced."""
    source, rng = bundle("llama-gqa", "pt2", 1), random.Random(SEED)
    expected, survivors = greedy(compiled("llama-gqa", 1), 1, 3)[0], 0
    folder = copy(source, tmp_path)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for number in range(MUTANTS):
        name = rng.choice(names) if number % 2 else manifest.NAME
        whole = (folder / name).read_bytes()
        (_in_json if name == manifest.NAME and rng.random() < 0.8 else _in_bytes)(folder / name, rng)
        try:
            runner = zs.load(folder)
        except zs.ZSMergeError as error:
            assert " must be " in str(error)
        else:
            survivors += 1
            assert torch.equal(greedy(runner, 1, 3)[0], expected), f"mutant {number} of {name}"
        (folder / name).write_bytes(whole)
    assert survivors < MUTANTS / 4


def _in_bytes(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    kind = rng.randrange(5)
    if kind == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        content[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 3:
        content[at : at + 16] = bytes(len(content[at : at + 16]))
    if kind == 4:
        path.unlink()
    else:
        path.write_bytes(content)


def _in_json(path: Path, rng: random.Random) -> None:
    """One value anywhere in the manifest replaced, or one key dropped."""
    raw = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []
    waiting = [raw]
    while waiting:
        found = waiting.pop()
        inner = list(found.items()) if isinstance(found, dict) else list(enumerate(found))
        places += [(found, key) for key, _ in inner]
        waiting += [value for _, value in inner if isinstance(value, dict | list)]
    holder, key = rng.choice(places)
    if rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = rng.choice([None, -1, 0, 1, 2**40, 1.5, "", "x", "../x", [], {}, True, [[]], "float16"])
    path.write_text(json.dumps(raw))
