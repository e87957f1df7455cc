"""The C++ runner writes what the eager model writes, from the bundle alone, and refuses what it cannot run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cpp_runner.build import build
from tests.bundles.made import PADS, bundle, compiled, copy, greedy
from tests.models_zoo import VOCAB, prompt

STEPS = 200
CASES = [
    ("llama-gqa", 1, "segment", None),
    ("llama-gqa", 3, "sequential", 16),
    ("mistral-w8", 3, "segment", None),
    ("falcon-7b", 1, "segment", None),
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
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
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
    assert "version must be 1, got 2" in refusal(rewritten(folder, version=2))
    written = "PyTorch must be 1.0.0+cpu, with which this bundle was written"
    assert written in refusal(rewritten(folder, version=1, format="aoti", versions=versions | {"torch": "1.0.0+cpu"}))


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
    text = (whole / "manifest.json").read_text()
    for cut in range(0, len(text) - 2, len(text) // 40):
        (folder / "manifest.json").write_text(text[:cut])
        assert refusal(folder).startswith("error: JSON ")


def test_the_limit_of_positions_holds(tmp_path: Path) -> None:
    folder = copy(bundle("llama-gqa", "aoti", 1), tmp_path)
    model = json.loads((folder / "manifest.json").read_text())["model"]
    rewritten(folder, model=model | {"max_positions": 32})
    assert run(folder, 3, *prompts(1)).returncode == 0
    assert "tokens seen must be at most 32, got 33" in refusal(folder, 4)


def test_manifest_text_is_read_as_json_has_it(tmp_path: Path) -> None:
    """Escapes, other alphabets and numbers of every kind may stand anywhere in a manifest."""
    folder = copy(bundle("llama-gqa", "aoti", 1), tmp_path)
    before = run(folder, 5, *prompts(1)).stdout
    odd = {'a"\\/\b\f\n\r\t\x01': "ä€😀", "n": [1.5e-3, -2, 1e300, True, False, None, {}, []]}
    for ascii in (True, False):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"policy": odd}, ensure_ascii=ascii))
        assert run(folder, 5, *prompts(1)).stdout == before != ""
