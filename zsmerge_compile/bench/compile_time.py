"""How long zs.compile takes from nothing: in a fresh process, with an empty compiler cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from zsmerge_compile.bench import shapes
from zsmerge_compile.bench.rows import Row
from zsmerge_compile.bench.shapes import Shape

LIMIT = 600  # seconds


def compile_seconds(shape: Shape, row: Row, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of `zs.compile` for `row.context` layers of a shape; raises RuntimeError where it fails."""
    job = {
        "model": shape.name,
        "layers": row.context,
        "budget": row.budget,
        "outline": row.outline,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }
    root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory() as folder:
        cold = {name: os.path.join(folder, name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        run = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(job)],
            env={**os.environ, **cold, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or ["no output"])[-1])
    return float(run.stdout.strip().splitlines()[-1])


def _job(text: str) -> None:
    import zsmerge_compile as zs

    job = json.loads(text)
    shape = replace(shapes.named(job["model"]), layers=job["layers"])
    model = shape.build(job["device"], getattr(torch, job["dtype"]))
    compiled = zs.compile(model, zs.ZSMergeConfig(budget=job["budget"]), outline=job["outline"])
    print(compiled.report.compile_seconds)


if __name__ == "__main__":
    _job(sys.argv[1])
