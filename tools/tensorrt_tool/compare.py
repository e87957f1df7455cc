"""A TensorRT step beside the reference and beside Inductor: what it computes, and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.testing.tolerance import HALF_FACTOR, LOGITS_FP32

BLOCK, WARM = 8, 3  # steps between two looks at the clock; blocks before any counts


def compare(ours: Any, reference: Any, inductor: Any, prompt: Tensor, steps: int) -> dict[str, Any]:
    """`steps` steps after prompt [B, T], each of all three from the reference's state, with rows pausing.

    Errors are of a tensor's range, the largest of all steps. fp32 must be within the table's tolerance, 16 bits within
    twice what Inductor differs by (as the first steps may round alike, by no less than one rounding).
    """
    logits = reference.prefill(prompt)
    errors = {"tensorrt": dict[str, float](), "inductor": dict[str, float]()}
    agree = total = 0
    for step in range(steps):
        token = logits.argmax(-1, keepdim=True)
        active = torch.ones(ours.batch_size, dtype=torch.bool, device=ours.device)
        active[-1] = step % 5 != 3 or ours.batch_size == 1
        for side in (ours, inductor):
            for mine, theirs in zip(_tensors(side), _tensors(reference), strict=True):
                mine.copy_(theirs)
        logits = reference.decode(token, active)
        for name, side in (("tensorrt", ours), ("inductor", inductor)):
            found = side.decode(token, active)
            _add(errors[name], "logits", found[active], logits[active])
            for field, mine, theirs in zip(_fields(side), side.cache.flat, reference.cache.flat, strict=True):
                _add(errors[name], field, mine, theirs)
            if name == "tensorrt":
                agree += int((found.argmax(-1) == logits.argmax(-1))[active].sum())
                total += int(active.sum())
    limit = LOGITS_FP32 if ours.dtype == torch.float32 else _half(errors["inductor"]["logits"], ours.dtype)
    good = all(error == error for error in errors["tensorrt"].values()) and errors["tensorrt"]["logits"] <= limit
    return {"steps": steps, "errors": errors, "logits_limit": limit, "same_token": agree / total, "good": good}


def _half(noise: float, dtype: torch.dtype) -> float:
    return HALF_FACTOR * max(noise, torch.finfo(dtype).eps)


def _tensors(side: Any) -> list[Tensor]:
    return [side.cache.seen_tokens, *side.cache.flat]


def _fields(side: Any) -> list[str]:
    return [name.split("_", 1)[1] for name in side.interface.state_names]


def _add(errors: dict[str, float], field: str, mine: Tensor, theirs: Tensor) -> None:
    """Dead slots are compared too: both sides start from the same content of them."""
    if theirs.numel() == 0:
        return
    one, other = mine.double(), theirs.double()
    error = float((one - other).abs().max()) / (float(other.max() - other.min()) or 1.0)
    errors[field] = error if error != error else max(errors.get(field, 0.0), error)


def timed(sides: Mapping[str, Any], prompt: Tensor, blocks: int = 40) -> dict[str, float]:
    """Milliseconds per token of each side, in turn: the median of blocks of 8 steps after a warm-up."""
    token = torch.full((prompt.shape[0], 1), 7, device=prompt.device)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.reset()
        side.prefill(prompt)
    for block in range(WARM + blocks):
        for name, side in sides.items():
            _wait(prompt.device)
            started = time.perf_counter()
            for _ in range(BLOCK):
                side.decode(token)
            _wait(prompt.device)
            if block >= WARM:
                found[name].append(1e3 * (time.perf_counter() - started) / BLOCK)
    return {name: statistics.median(times) for name, times in found.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
