"""A TensorRT step beside the reference and beside Inductor: what it computes, and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.bench.differences import ordered
from zsmerge_compile.ops.state import State
from zsmerge_compile.testing.tolerance import HALF_FACTOR, LOGITS_FP32

BLOCK, WARM = 8, 3  # steps between two looks at the clock; blocks before any counts
DECIDED = 0.05  # of a layer's heads may keep other tokens than the reference, over all steps: rounding decides ties


class Tally:
    """How far a side is from the reference: errors as shares of a tensor's range, the largest of all steps."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self._other: list[Tensor] = []  # per step: [layers] share of heads that keep other tokens
        self._same_token: list[Tensor] = []

    def add(self, side: Any, found: Tensor, reference: Any, logits: Tensor, active: Tensor) -> None:
        """After a step of both, with these logits [B, vocab]."""
        self._error("logits", found[active], logits[active])
        self._same_token.append((found.argmax(-1) == logits.argmax(-1))[active])
        other = []
        for mine, its in zip(_layers(side), _layers(reference), strict=True):
            exact = ("position", "weight", "order of opening")
            same = torch.stack([(mine[field] == its[field]).all(-1) for field in exact]).all(0)
            other.append(1 - same.float().mean())
            for field in mine:
                self._error(field, mine[field][same], its[field][same])
        self._other.append(torch.stack(other))

    def _error(self, field: str, mine: Tensor, theirs: Tensor) -> None:
        if theirs.numel() == 0:
            return
        one, other = mine.double(), theirs.double()
        error = float((one - other).abs().max()) / (float(other.max() - other.min()) or 1.0)
        self.errors[field] = error if error != error else max(self.errors.get(field, 0.0), error)

    @property
    def kept_others(self) -> float:
        """Of the layer where most heads did: their share, over all steps."""
        return float(torch.stack(self._other).mean(0).max())

    @property
    def same_token(self) -> float:
        return float(torch.cat(self._same_token).float().mean())

    def good(self, limits: Mapping[str, float]) -> bool:
        """NaN is above every limit."""
        within = all(error <= limits[field] for field, error in self.errors.items())
        return within and self.kept_others <= DECIDED

    def told(self) -> dict[str, Any]:
        return {"errors": self.errors, "kept_others": self.kept_others, "same_token": self.same_token}


def compare(ours: Any, reference: Any, inductor: Any | None, prompt: Tensor, steps: int) -> dict[str, Any]:
    """`steps` steps after prompt [B, T], with rows pausing; ours and Inductor's state set to the reference's before
    every other one, so that each also goes on from what it wrote itself.

    Logits and state are compared slot by slot, in the order of their tokens. fp32 must be within the table's tolerance,
    16 bits within twice what Inductor differs by (as the first steps may round alike, by no less than one rounding);
    heads that keep other tokens are counted, and left out of the comparison of their content.
    """
    sides = {"tensorrt": ours} | ({} if inductor is None else {"inductor": inductor})
    tallies = {name: Tally() for name in sides}
    logits = reference.prefill(prompt)
    for step in range(steps):
        token = logits.argmax(-1, keepdim=True)
        active = torch.ones(ours.batch_size, dtype=torch.bool, device=ours.device)
        active[-1] = step % 5 != 3 or ours.batch_size == 1
        if step % 2 == 0:
            for side in sides.values():
                for mine, theirs in zip(_tensors(side), _tensors(reference), strict=True):
                    mine.copy_(theirs)
        logits = reference.decode(token, active)
        for name, side in sides.items():
            tallies[name].add(side, side.decode(token, active), reference, logits, active)
    told: dict[str, Any] = {name: tally.told() for name, tally in tallies.items()}
    noise = tallies["inductor"].errors if inductor is not None else {}
    limits = {field: _limit(ours.dtype, noise.get(field, 0.0)) for field in tallies["tensorrt"].errors}
    return {"steps": steps, **told, "limits": limits, "good": tallies["tensorrt"].good(limits)}


def _limit(dtype: torch.dtype, noise: float) -> float:
    return LOGITS_FP32 if dtype == torch.float32 else HALF_FACTOR * max(noise, torch.finfo(dtype).eps)


def _tensors(side: Any) -> list[Tensor]:
    return [side.cache.seen_tokens, *side.cache.flat]


def _layers(side: Any) -> list[dict[str, Tensor]]:
    return [ordered(State(*(getattr(layer, name) for name in State._fields))) for layer in side.cache.layers]


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
