"""The C++ runner writes what the eager model writes, from the bundle alone, and refuses what it cannot run."""

from __future__ import annotations

import json
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from cpp_runner.build import build
from tests.bundles.made import PADS, bundle, compiled, copy, greedy
from tests.models_zoo import VOCAB, prompt
from zsmerge_compile.bundles import manifest

STEPS = 200
CASES = [
    ("llama-gqa", 1, "segment", None),
    ("llama-gqa", 3, "sequential", 16),
    ("mistral-w8", 3, "segment", None),
    ("falcon-7b", 3, "segment", None),
]


def run(folder: Path, steps: int, *prompts: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([build(), folder, str(steps), *prompts], capture_output=True, text=True, check=False)


def prompts(batch: int) -> list[str]:
    ids = prompt(batch, 30, pads=PADS[:batch])["input_ids"].tolist()
    return [",".join(map(str, row[pads:])) for row, pads in zip(ids, PADS, strict=False)]


@pytest.mark.parametrize("name, batch, merge, chunk", CASES)
def test_the_same_tokens(name: str, batch: int, merge: str, chunk: int | None) -> None:
    how = (batch, merge, chunk)
    done = run(bundle(name, "aoti", *how), STEPS, *prompts(batch))
    assert done.returncode == 0, done.stderr
    written = [[int(token) for token in line.split(",")] for line in done.stdout.splitlines()]
    assert written == greedy(compiled(name, *how), batch, STEPS)[0].tolist()


def refusal(folder: Path, steps: int = 3, *given: str) -> str:
    done = run(folder, steps, *(given or prompts(1)))
    assert done.returncode == 1 and done.stdout == ""
    return done.stderr


def rewritten(folder: Path, **fields: Any) -> Path:
    path = folder / "manifest.json"
    path.write_text(manifest.sealed(json.loads(path.read_text()) | fields))
    return folder


def test_input_is_refused() -> None:
    folder = bundle("llama-gqa", "aoti", 1)
    assert "prompts must be 1, got 2" in refusal(folder, 3, "1", "2")
    assert f"tokens must be in 0 .. {VOCAB - 1}" in refusal(folder, 3, str(VOCAB))
    assert "argument must be a number" in refusal(folder, 3, "1,x")
    assert "argument must be a number" in refusal(folder, 3, "1,")
    assert "steps must be at least 1, got 0" in refusal(folder, 0)


def test_another_format_version_or_pytorch_is_refused(tmp_path: Path) -> None:
    folder = copy(bundle("llama-gqa", "aoti", 1), tmp_path)
    versions = json.loads((folder / "manifest.json").read_text())["versions"]
    assert "format must be aoti, got pt2" in refusal(rewritten(folder, format="pt2"))
    known = manifest.VERSION
    assert f"version must be {known}, got {known + 1}" in refusal(rewritten(folder, version=known + 1))
    foreign = rewritten(folder, version=known, format="aoti", versions=versions | {"torch": "1.0.0+cpu"})
    assert "PyTorch must be 1.0.0+cpu, with which this bundle was written" in refusal(foreign)


def test_damaged_bundles_are_refused(tmp_path: Path) -> None:
    assert "bundle must be a folder with manifest.json" in refusal(tmp_path)
    whole = bundle("llama-gqa", "aoti", 1)
    folder = copy(whole, tmp_path)
    (folder / "decode.pt2").unlink()
    assert "decode.pt2 of the bundle must be a file, got none" in refusal(folder)
    shutil.copy(whole / "decode.pt2", folder)
    (folder / "weights.safetensors").write_bytes((whole / "weights.safetensors").read_bytes()[:-4])
    assert "weights.safetensors of the bundle must be" in refusal(folder)
    shutil.copy(whole / "weights.safetensors", folder)
    changed = bytearray((whole / "prefill.pt2").read_bytes())
    changed[len(changed) // 2] ^= 1
    (folder / "prefill.pt2").write_bytes(changed)
    assert "prefill.pt2 of the bundle must be what was written (SHA-256), got other content" in refusal(folder)
    shutil.copy(whole / "prefill.pt2", folder)
    text = (whole / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"batch_size": 1', '"batch_size": 2'))
    assert "manifest must be what was written (SHA-256), got other content" in refusal(folder)
    for cut in range(0, len(text) - 2, len(text) // 40):
        (folder / "manifest.json").write_text(text[:cut])
        assert refusal(folder).startswith("error: JSON ")


def test_the_limit_of_positions_holds(tmp_path: Path) -> None:
    folder = copy(bundle("llama-gqa", "aoti", 1), tmp_path)
    model = json.loads((folder / "manifest.json").read_text())["model"]
    rewritten(folder, model=model | {"max_positions": 32})
    assert run(folder, 3, *prompts(1)).returncode == 0
    assert "tokens seen must be at most 32, got 33" in refusal(folder, 4)


def test_values_that_no_bundle_has(tmp_path: Path) -> None:
    """Signed, so that they reach the checks."""
    folder = copy(bundle("llama-gqa", "aoti", 1), tmp_path)
    original = json.loads((folder / "manifest.json").read_text())
    layer = original["cache"]["layers"][0]
    other_rows = [[layer[0][0], [2, *layer[0][1][1:]], layer[0][2]], *layer[1:]]
    for fields, message in (
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"chunk": "x"}, "JSON value must be an integer"),
        ({"model": original["model"] | {"vocab_size": 0}}, "vocab_size must be at least 1, got 0"),
        ({"cache": original["cache"] | {"device": "tpu"}}, "bundle's device must be cpu or cuda, got tpu"),
        ({"cache": original["cache"] | {"layers": [other_rows]}}, "rows of the cache must be 1"),
        (
            {"files": {"../weights": {"bytes": 1, "sha256": ""}}},
            "must be a plain path inside the bundle, got ../weights",
        ),
        ({"files": {}}, "file of prefill must be one of the bundle's, got prefill.pt2"),
    ):
        assert message in refusal(rewritten(folder, **(original | fields)))


def test_manifest_text_is_read_as_json_has_it(tmp_path: Path) -> None:
    """Escapes, other alphabets and numbers of every kind may stand anywhere in a manifest."""
    folder = copy(bundle("llama-gqa", "aoti", 1), tmp_path)
    before = run(folder, 5, *prompts(1)).stdout
    odd = {'a"\\/\b\f\n\r\t\x01': "ä€😀", "n": [1.5e-3, -2, 1e300, True, False, None, {}, []]}
    path = folder / "manifest.json"
    fields = json.loads(path.read_text()) | {"policy": odd}
    del fields["sha256"]
    for ascii in (True, False):
        body = json.dumps(fields, indent=1, ensure_ascii=ascii)[:-2]
        path.write_text(f'{body},\n "sha256": "{sha256(body.encode()).hexdigest()}"\n}}\n')
        assert run(folder, 5, *prompts(1)).stdout == before != ""
