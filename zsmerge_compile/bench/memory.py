"""How much memory a call takes at its highest.

A GPU's allocator counts. On a CPU the kernel does: the resident set's high-water mark is set back before the call, so
that it tells of this call alone (Linux); elsewhere only the process's highest so far is known, and said to be that.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

GPU = "device memory: weights, the row's cache and what a call adds; other rows' taken off"
CALL = "resident memory: weights and the row's cache (counted), and what a call adds to the process (measured)"
PROCESS = "resident memory: the whole process's highest so far, other rows and the compiler included"


class Peak(NamedTuple):
    """bytes, and in words of what."""

    bytes: int
    of: str


def allocated(device: torch.device) -> int:
    """Bytes held on a GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(call: Callable[[], object], device: torch.device, weights: int, held: int, before: int) -> Peak:
    """Of one call.

    weights  bytes of the model
    held     bytes of the cache that is there before the call
    before   `allocated` before the row was built
    """
    return _gpu(call, device, weights - before) if device.type == "cuda" else _cpu(call, weights + held)


def _gpu(call: Callable[[], object], device: torch.device, beside: int) -> Peak:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return Peak(torch.cuda.max_memory_allocated(device) + beside, GPU)


def _cpu(call: Callable[[], object], beside: int) -> Peak:
    _give_back()
    if not _reset():
        call()
        unit = 1 if sys.platform == "darwin" else 1024
        return Peak(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, PROCESS)
    before = _status("VmRSS")
    call()
    return Peak(beside + max(0, _status("VmHWM") - before), CALL)


def _reset() -> bool:
    """Set the high-water mark back to what is resident now; whether that could be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _give_back() -> None:
    """Freed memory that the allocator kept would hide what a call takes again."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
