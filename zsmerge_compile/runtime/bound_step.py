"""A decode step by an engine that reads one set of state tensors and writes another, bound by their addresses.

The caller's tensors (those of the cache) always hold the current state. After a step they and the spare ones change
memory, `tensor.data` for `tensor.data`, so nothing is copied; every tensor object stays the one that prompts, reset,
save and load use. A view that was taken before the step shows the state before it. What the engine writes in place
stays where it is.

On a GPU the engine's work is recorded as a CUDA graph for each of the two ways the sets can lie, and replayed. Each
recording has an execution context to itself: what a context keeps for its addresses may be part of what was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zsmerge_compile.program import Interface
from zsmerge_compile.runtime.graphs import Recorder, Recording

_RECORDINGS = 8  # kept at once: two serve one cache, six serve two that share a step

# (inputs, outputs): reads and fills memory it is told the addresses of; it may return before the work is done
Run = Callable[[Sequence[Tensor], Sequence[Tensor]], None]


class Engine(Protocol):
    """What `context` gives runs the engine.

    inputs    token_ids int64 [B, 1], seen int64 [B], active bool [B], and the state without its empty tensors
    outputs   logits [B, vocab], and the new state in the same order
    in_place  numbers of the state tensors whose output must be given the memory of its input
    """

    in_place: frozenset[int]

    def context(self) -> Run: ...


class _Kept(NamedTuple):
    recording: Recording
    context: Run  # must live as long


class BoundStep:
    """(token_ids [B, 1], seen [B], active [B], *state) -> logits [B, vocab], as `Program.decode`.

    spare_bytes: what the second set of state tensors takes, besides the cache.
    """

    def __init__(self, engine: Engine, interface: Interface, record: Recorder | None = None) -> None:
        """record: how the engine's work is recorded, None: it is called for every token."""
        self.engine, self._record, self._device = engine, record, interface.device
        self.how = "called directly" if record is None else "CUDA graphs, one for each set of state tensors"
        specs = [spec for layer in interface.state for spec in layer.values()]
        self._held = [number for number, spec in enumerate(specs) if 0 not in spec.shape]
        batch = interface.batch_size
        with torch.inference_mode(False):
            self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=self._device)
            self._active = torch.zeros(batch, dtype=torch.bool, device=self._device)
            self._logits = torch.zeros(batch, interface.vocab_size, dtype=interface.dtype, device=self._device)
            self._spare = {
                place: torch.zeros(specs[number].shape, dtype=specs[number].dtype, device=self._device)
                for place, number in enumerate(self._held)
                if place not in engine.in_place
            }
        self.spare_bytes = sum(tensor.nbytes for tensor in self._spare.values())
        self._recordings: dict[tuple[int, ...], _Kept] = {}
        self._context = None if record else engine.context()

    def prepare(self, seen: Tensor, *state: Tensor) -> None:
        """Record both ways of a cache's tensors now rather than with its first two tokens; its state stays."""
        if self._record is None:
            return
        live = [state[number] for number in self._held]
        for _ in range(2):  # there and back
            self._recorded(self._record, seen, live)
            self._swap(live)

    def __call__(self, token_ids: Tensor, seen: Tensor, active: Tensor, *state: Tensor) -> Tensor:
        live = [state[number] for number in self._held]
        self._part(live)
        self._ids.copy_(token_ids)  # an engine wants aligned memory, and a recording always the same
        self._active.copy_(active)
        if self._context is not None:
            logits = self._run(self._context, seen, live)
        else:
            assert self._record is not None
            recording = self._recorded(self._record, seen, live)
            recording.replay()
            logits = recording.output
        self._swap(live)
        return logits.clone()

    def _swap(self, live: Sequence[Tensor]) -> None:
        for place, spare in self._spare.items():
            live[place].data, spare.data = spare.data, live[place].data

    def _part(self, live: Sequence[Tensor]) -> None:
        """A swap that was interrupted (by Ctrl-C, say) leaves two tensors over one memory: give one its own again."""
        for place, spare in self._spare.items():
            if spare.data_ptr() == live[place].data_ptr():
                spare.data = torch.zeros_like(spare)

    def _run(self, context: Run, seen: Tensor, live: Sequence[Tensor]) -> Tensor:
        new = [self._spare.get(place, tensor) for place, tensor in enumerate(live)]
        context((self._ids, seen, self._active, *live), (self._logits, *new))
        return self._logits

    def _recorded(self, record: Recorder, seen: Tensor, live: Sequence[Tensor]) -> Recording:
        """Of these tensors' memory; made where there is none, with no row active, which leaves the live state alone."""
        key = tuple(tensor.data_ptr() for tensor in (seen, *live, *self._spare.values()))
        if key not in self._recordings:
            if len(self._recordings) == _RECORDINGS:
                del self._recordings[next(iter(self._recordings))]
            context = self.engine.context()
            with torch.inference_mode(False), torch.no_grad():
                active = self._active.clone()
                self._active.zero_()
                self._recordings[key] = _Kept(record(lambda: self._run(context, seen, live)), context)
                self._active.copy_(active)
        return self._recordings[key].recording
