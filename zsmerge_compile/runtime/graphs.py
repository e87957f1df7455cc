"""One decode step, recorded once as a CUDA graph and replayed for every token.

A graph is bound to addresses, so a step reads its inputs from buffers that never move: the token ids and active rows
(copied in here), seen_tokens and the cache's state (`Cache.reset` keeps their places, so nothing is recorded anew).
The ring's cursor and the position follow from seen_tokens, which the graph raises itself: the host has no part in it.
Chunks of a prompt are not recorded: their length, rows and padding differ from call to call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_WARM_UP = 3  # runs before recording: kernels are loaded and workspaces allocated in the first


class Recording(NamedTuple):
    """replay(): does the recorded work again, on the same memory. output: where its result then lies."""

    replay: Callable[[], object]
    output: Tensor


Recorder = Callable[[Callable[[], Tensor]], Recording]
Decode = Callable[..., Tensor]  # (token_ids [B, 1], seen [B], active [B], *state) -> logits [B, vocab]


class DirectStep:
    """step(token_ids int64 [B, 1], active bool [B]) -> logits [B, vocab], the state and seen [B] raised in place."""

    def __init__(self, decode: Decode, seen: Tensor, state: Sequence[Tensor]) -> None:
        self._decode, self._seen, self._state = decode, seen, tuple(state)
        if hasattr(decode, "prepare"):
            decode.prepare(seen, *self._state)
        self.how: str = getattr(decode, "how", "called directly")  # some decodes record themselves

    def __call__(self, token_ids: Tensor, active: Tensor) -> Tensor:
        logits = self._decode(token_ids, self._seen, active, *self._state)
        self._seen.add_(active)
        return logits


class RecordedStep:
    """A DirectStep over static buffers, recorded: the same call, the same result.

    It is recorded with no row active, which leaves the state and seen as they are.
    """

    how = "one CUDA graph"

    def __init__(self, step: DirectStep, seen: Tensor, record: Recorder) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._token_ids = torch.zeros(seen.shape[0], 1, dtype=torch.int64, device=seen.device)
            self._active = torch.zeros(seen.shape[0], dtype=torch.bool, device=seen.device)
            self._replay, self._logits = record(lambda: step(self._token_ids, self._active))

    def __call__(self, token_ids: Tensor, active: Tensor) -> Tensor:
        self._token_ids.copy_(token_ids)
        self._active.copy_(active)
        self._replay()
        return self._logits.clone()  # the next replay writes over it


def recorder_for(device: torch.device, backend: str) -> Recorder | None:
    """How steps are recorded on `device`, or None: there the step is called directly.

    The eager backend is never recorded: its reference ops look at the data from the host. TensorRT's step moves the
    cache to other memory with every token, and records its engine's work itself (`bound_step.py`).
    """
    return cuda_recorder(device) if device.type == "cuda" and backend not in ("eager", "tensorrt") else None


def cuda_recorder(device: torch.device) -> Recorder:
    """Records on a stream and in a memory pool of its own; replays on the stream that is current then."""

    def record(run: Callable[[], Tensor]) -> Recording:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads of a server may go on using the device meanwhile
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                output = run()
        return Recording(graph.replay, output)

    return record
