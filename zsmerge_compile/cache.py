"""The compressed cache of a compiled model: fixed tensors, one state per layer, and what each row has seen."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import Tensor

from zsmerge_compile import cache_file
from zsmerge_compile.errors import CacheStateError, must
from zsmerge_compile.program import Interface
from zsmerge_compile.runtime import inputs

Rows = Iterable[int] | Tensor | None


class Cache:
    """State of B rows.

    layers       one namespace per layer with the policy's tensors: key, value [B, G, S, D], weight, score, position
                 [B, G, S], ...; weight 0 marks an empty slot; S is at least budget + 1
    seen_tokens  [B] int64: real tokens each row has seen
    nbytes       bytes allocated for all layers and seen_tokens, and for the second set of them where a step needs one
    changes      raised with every change, so that what was true of an earlier content is known to be out of date
    longest      tokens in the fullest row, or more: known without asking the device
    """

    def __init__(self, interface: Interface) -> None:
        self.interface = interface
        self.changes = self.longest = self.spare_bytes = 0
        self._states = interface.allocate()
        self.layers = [SimpleNamespace(**state) for state in self._states]
        with torch.inference_mode(False):
            self.seen_tokens = torch.zeros(interface.batch_size, dtype=torch.int64, device=interface.device)
        self.flat: list[Tensor] = [tensor for state in self._states for tensor in state.values()]
        self._broken = [False] * interface.batch_size

    @property
    def nbytes(self) -> int:
        return self.spare_bytes + sum(tensor.nbytes for tensor in (*self.flat, self.seen_tokens))

    def reset(self, rows: Rows = None) -> None:
        """Empty all rows, or some; they are valid again. Every tensor keeps its place in memory. Raises InputError."""
        chosen = inputs.check_rows(rows, len(self._broken))
        self.changes += 1
        with torch.no_grad():
            for tensor in (*self.flat, self.seen_tokens):
                if rows is None:
                    tensor.zero_()
                else:
                    tensor[chosen] = 0
        self._valid(chosen)

    def save(self, path: str | os.PathLike[str], rows: Rows = None) -> None:
        """Write all rows, or some in the order given, to one safetensors file: `load` puts them into any cache of the
        same layout, whatever its batch size, backend or bundle. Raises InputError or CacheStateError.
        """
        chosen = inputs.check_rows(rows, len(self._broken))
        self.require_valid(chosen)
        cache_file.write(path, self.interface, [tensor[chosen] for tensor in (self.seen_tokens, *self.flat)])

    def load(self, path: str | os.PathLike[str], rows: Rows = None) -> None:
        """Replace all rows, or some in the order given, by the rows of a file that `save` wrote; they are valid then.

        The file must have as many rows and the same policy (of LESS, the same eviction and weights) and layers (shapes,
        dtypes and parts of the budget); which model filled it is not known. Raises InputError, and nothing is written.
        """
        chosen = inputs.check_rows(rows, len(self._broken))
        loaded = cache_file.read(path, self.interface, len(chosen))
        self.changes += 1
        self.mark_broken(chosen)
        with torch.no_grad():
            for tensor, saved in zip((self.seen_tokens, *self.flat), loaded, strict=True):
                tensor[chosen] = saved.to(tensor.device)
        self._valid(chosen)

    def _valid(self, rows: list[int]) -> None:
        """These rows were written whole."""
        for row in rows:
            self._broken[row] = False
        self.longest = int(self.seen_tokens.max())

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
