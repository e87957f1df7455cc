"""Compile time hardly grows with the depth: layers that are alike are compiled once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import zsmerge_compile as zs
from tests.models_zoo import tiny


@pytest.mark.slow
def test_32_layers_compile_in_at_most_twice_the_time_of_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an empty cache each time; the first compilation of a process, which pays for all imports, is not timed."""
    seconds = {}
    for turn, layers in enumerate((2, 4, 32)):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / str(turn)))
        torch._dynamo.reset()
        model = tiny("llama-gqa", num_hidden_layers=layers)
        started = time.perf_counter()
        zs.compile(model, zs.ZSMergeConfig(64), outline=True)
        seconds[layers] = time.perf_counter() - started
    assert seconds[32] <= 2 * seconds[4], seconds
