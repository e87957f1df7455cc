"""What torch-tensorrt 2.13 itself makes of our steps, without TensorRT: one engine, and a network that computes them.

Skipped where `tools/tensorrt_parts` has not put torch-tensorrt and TensorRT's bindings into build/tensorrt, or where
they cannot be imported by way of `without_libraries.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zsmerge_compile.lower import tensorrt

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "build" / "tensorrt"
STEPS = ["llama-gqa:float32", "llama-gqa:bfloat16", "mistral-w8:float16", "falcon-7b:float32", "falcon-rw:bfloat16"]
POLICIES = ["llama-gqa/snapkv:float32", "llama-gqa/less:bfloat16"]
REFUSED = "llama-gqa/cam:float32"
CONTROLS = ["control:plain", "control:custom", "control:linalg_qr", "control:searchsorted"]
LAYOUTS = ["layout:scatter", "layout:regions"]
WITHOUT = ["llama-gqa:float32:slot_access", "llama-gqa:bfloat16:tensorrt_spelling"]
FP32, HALF = 5e-6, 0.02  # of a tensor's range, after one step from the same state


def run(*cases: str) -> dict[str, dict[str, Any]]:
    if not (PARTS / "torch_tensorrt").is_dir():
        pytest.skip("torch-tensorrt is not in build/tensorrt: tools/tensorrt_parts puts it there (24 MB)")
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed, which makes the stubs of TensorRT's libraries")
    command = [sys.executable, "-m", "tests.tensorrt.converters", str(PARTS), *cases]
    single = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=single, capture_output=True, text=True, check=False)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    if not told and done.returncode:
        last = (done.stderr.splitlines() or [f"status {done.returncode}, no word"])[-1]
        pytest.skip(f"torch-tensorrt cannot be imported without TensorRT here: {last}")
    return {line["case"]: line for line in told}


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, Any]]:
    return run(*STEPS, *POLICIES, REFUSED, *CONTROLS, *LAYOUTS, *WITHOUT, "names:runtime")


@pytest.mark.parametrize("case", [*STEPS, *POLICIES])
def test_a_step_is_one_engine_with_every_operator_in_the_registry(case: str, told: dict[str, Any]) -> None:
    found = told[case]
    assert "failed" not in found, found
    assert (found["engines"], found["others"], found["rest"]) == (1, 0, [])
    assert found["known"] == found["operators"] > 350


@pytest.mark.parametrize("case", [*STEPS, *POLICIES])
def test_the_network_computes_the_step(case: str, told: dict[str, Any]) -> None:
    """24 steps past the budget with a row pausing, each from the state of the step in place: every state tensor has
    its dtype, and its values."""
    found = told[case]
    limit = FP32 if case.endswith("float32") else HALF
    more = {"less": {"low_rank", "normalizer"}, "snapkv": set(), "": {"masters of keys", "mean position"}}
    more_here = more[case.partition(":")[0].partition("/")[2]]
    assert {"logits", "key", "value", "weight", "score", "position"} | more_here <= set(found["errors"])
    assert all(error <= limit for error in found["errors"].values()), found["errors"]
    assert found["errors"]["weight"] == found["errors"]["position"] == 0


def test_the_names_our_driver_uses_are_those_of_the_bindings(told: dict[str, Any]) -> None:
    assert told["names:runtime"]["missing"] == []


def test_operators_without_a_converter_are_found(told: dict[str, Any]) -> None:
    assert told["control:plain"]["refusal"] == ""
    for case, operator in (
        ("control:custom", "zsmerge_control.twice"),
        ("control:linalg_qr", "aten.linalg_qr"),
        ("control:searchsorted", "aten.searchsorted"),
    ):
        found = told[case]
        assert found["known"] < found["operators"] and found["engines"] + found["others"] == 3
        assert "segments of a TensorRT step must be 1, got 3" in found["refusal"] and operator in found["refusal"]


def test_a_policy_that_draws_by_bits_takes_more_than_one_engine(told: dict[str, Any]) -> None:
    """CaM's hash: TensorRT has no layer for the bits of an integer."""
    found = told[REFUSED]
    assert found["engines"] + found["others"] > 1
    assert set(found["rest"]) == {"aten.__rshift__.Scalar", "aten.bitwise_and.Scalar", "aten.bitwise_xor.Tensor"}


def test_without_our_spelling_it_would_go_wrong(told: dict[str, Any]) -> None:
    """The registry takes these graphs as well: only the conversion shows it."""
    ungathered, unspelled = (told[case] for case in WITHOUT)
    assert "While executing %index_put" in ungathered["failed"]
    assert "failed" in unspelled


def test_the_layout_that_was_kept_takes_fewer_nodes(told: dict[str, Any]) -> None:
    """And the figures in the backend's docstring are these."""
    scatter, regions = (told[case] for case in LAYOUTS)
    rows = []
    for name in ("operators", "layers", "products"):
        pair = []
        for found in (scatter, regions):
            layers = found["layers"]
            figures = {
                "operators": f"{found['operators']}",
                "layers": f"{sum(layers.values()) - layers['constant']}",
                "products": f"{layers['matrix multiply']} and {layers['scatter']}",
            }
            pair.append(figures[name])
        rows.append(" | ".join(pair))
    assert tensorrt.__doc__ is not None
    assert all(f"| {row} |" in tensorrt.__doc__ for row in rows), rows
    assert scatter["operators"] < regions["operators"]
