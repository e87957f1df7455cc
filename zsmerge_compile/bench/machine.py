"""The machine a figure holds for: hardware, versions, free memory, and how fast it copies."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from zsmerge_compile.bench.timing import Plan, Step, measure

RESERVE = 0.06  # of the memory is left to the allocator, the compiler and what else runs


def conditions(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, and how busy the machine was at the start."""
    import transformers

    import zsmerge_compile

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton() if device.type == "cuda" else None,
        "transformers": transformers.__version__,
        "zsmerge_compile": zsmerge_compile.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_memory(device: torch.device) -> int:
    """Bytes that a benchmark may plan with, its model's weights included."""
    return usable(total_memory(device) if device.type == "cuda" else _available())


def usable(memory: int) -> int:
    """Of so many bytes, those that a benchmark may plan with."""
    return int(memory * (1 - RESERVE))


def free_memory(device: torch.device) -> int:
    """Bytes nobody holds at the moment."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else _available()


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written, median of ten."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    ms = measure({"copy": Step(lambda: target.copy_(source))}, Plan(rounds=10), device)["copy"].ms
    return 2 * size / ms / 1e6


def spread(times: Sequence[float]) -> float:
    """How far times lie from their median at most, as a share of it."""
    middle = median(times)
    return max(abs(value - middle) for value in times) / middle


def _available() -> int:
    """MemAvailable, within what a container may take."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return free if text == "max" else min(free, int(text))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _triton() -> str | None:
    try:
        return version("triton")
    except ModuleNotFoundError:
        return None
