"""What a figure needs beside it: the machine, the versions, the command."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers

import zsmerge_compile


def conditions() -> dict[str, object]:
    """Hardware, versions and command line."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "zsmerge_compile": zsmerge_compile.__version__,
        "command": "tools/bench " + " ".join(sys.argv[1:]),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def interleaved(steps: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of each step, the steps taken in turn so that a slow spell of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn >= warmup:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: median(values) for name, values in times.items()}


def copy_bandwidth(size: int = 2**28) -> float:
    """GB/s of a large copy, bytes read plus bytes written, best of five."""
    source, target = torch.ones(size // 4), torch.empty(size // 4)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return 2 * size / best / 1e9
