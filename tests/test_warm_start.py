"""A second process finds the compiled code in Inductor's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import zsmerge_compile as zs
from tests.models_zoo import tiny
model = tiny("llama-gqa", num_hidden_layers=1)
eager = zs.compile(model, zs.ZSMergeConfig(budget=16), backend="eager").report.compile_seconds
from torch._dynamo.utils import counters
compiled = zs.compile(model, zs.ZSMergeConfig(budget=16), backend="inductor")
print(eager, compiled.report.compile_seconds, counters["aot_autograd"]["autograd_cache_hit"])
"""


def seconds(cache: Path) -> tuple[float, float, int]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    eager, inductor, hits = done.stdout.split()[-3:]
    return float(eager), float(inductor), int(hits)


@pytest.mark.slow
def test_second_process_compiles_in_a_quarter_of_the_time(tmp_path: Path) -> None:
    """Both graphs come from the cache: nothing but tracing and the passes is left."""
    _, cold, cold_hits = seconds(tmp_path)
    _, warm, warm_hits = seconds(tmp_path)
    assert (cold_hits, warm_hits) == (0, 2)
    assert warm <= cold / 4
