"""The compressed cache of a compiled model: fixed tensors, one state per layer, and what each row has seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from zsmerge_compile.errors import CacheStateError, must
from zsmerge_compile.program import Interface


class Cache:
    """State of B rows.

    layers       one namespace per layer with the policy's tensors: key, value [B, G, S, D], weight, score, position
                 [B, G, S], ...; weight 0 marks an empty slot; S is at least budget + 1
    seen_tokens  [B] int64: real tokens each row has seen
    nbytes       bytes allocated for all layers and seen_tokens
    """

    def __init__(self, interface: Interface) -> None:
        self._states = interface.allocate()
        self.layers = [SimpleNamespace(**state) for state in self._states]
        with torch.inference_mode(False):
            self.seen_tokens = torch.zeros(interface.batch_size, dtype=torch.int64, device=interface.device)
        self.flat: list[Tensor] = [tensor for state in self._states for tensor in state.values()]
        self._broken = [False] * interface.batch_size

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.flat, self.seen_tokens))

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empty all rows, or some; they are valid again. Every tensor keeps its place in memory."""
        chosen = range(len(self._broken)) if rows is None else rows
        with torch.no_grad():
            for tensor in (*self.flat, self.seen_tokens):
                if rows is None:
                    tensor.zero_()
                else:
                    tensor[list(rows)] = 0
        for row in chosen:
            self._broken[row] = False

    def mark_broken(self, rows: Iterable[int]) -> None:
        """A call on these rows broke midway: their state means nothing until reset."""
        for row in rows:
            self._broken[row] = True

    def broken_rows(self) -> list[int]:
        """Rows that must be reset before use."""
        return [row for row, broken in enumerate(self._broken) if broken]

    def require_valid(self, rows: Iterable[int]) -> None:
        """Raise CacheStateError if a call on any of `rows` broke earlier."""
        broken = sorted(set(rows) & set(self.broken_rows()))
        if broken:
            raise CacheStateError(
                must(
                    f"cache rows {broken}",
                    "valid",
                    "rows that an earlier call left half written",
                    f"reset(rows={broken})",
                )
            )
