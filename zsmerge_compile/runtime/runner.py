"""Two graphs and a cache that never grows: prompts and tokens in, logits out, whatever the graphs come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zsmerge_compile.cache import Cache, Rows
from zsmerge_compile.errors import CacheStateError, must
from zsmerge_compile.program import Interface
from zsmerge_compile.runtime import inputs
from zsmerge_compile.runtime.generate import GenerateMixin
from zsmerge_compile.runtime.graphs import Decode, DirectStep, RecordedStep, Recorder


class Runner(GenerateMixin):
    """prefill, decode, reset and generate over a cache.

    interface  batch size, dtype, device, vocabulary, positions and the cache's tensors
    cache      `Cache`: layers, seen_tokens, nbytes, save and load
    chunk      columns of a chunk of a prompt; None: prompts go in whole
    config, generation_config  what transformers' generate reads; None: it cannot be called
    """

    def __init__(
        self,
        interface: Interface,
        prefill: Callable[..., Tensor],
        decode: Decode,
        *,
        chunk: int | None,
        check_nan: bool = False,
        record: Recorder | None = None,
        config: Any = None,
        generation_config: Any = None,
        cache: Cache | None = None,
    ) -> None:
        """prefill, decode: with the signatures of `Program`'s graphs; record: how the step is recorded, if at all;
        cache: one that others use too, None: an empty one of its own.
        """
        self.interface = interface
        self.config, self.generation_config = config, generation_config
        self.device, self.dtype, self.batch_size = interface.device, interface.dtype, interface.batch_size
        self.max_positions = interface.max_positions
        self.cache = Cache(interface) if cache is None else cache
        self.cache.spare_bytes = getattr(decode, "spare_bytes", 0)
        self.decode_graph = decode  # (token_ids, seen, active, *state) -> logits, without checks or bookkeeping
        self.prefill_graph = prefill
        self.chunk = chunk
        self._check_nan = check_nan
        self._numbers = torch.arange(self.batch_size, device=self.device)
        self._all_rows = torch.ones(self.batch_size, dtype=torch.bool, device=self.device)
        self._step = self._steps(record)

    def _steps(self, record: Recorder | None) -> DirectStep | RecordedStep:
        step = DirectStep(self.decode_graph, self.cache.seen_tokens, self.cache.flat)
        return step if record is None else RecordedStep(step, self.cache.seen_tokens, record)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: Rows = None) -> Tensor:
        """Feed a prompt, or more tokens to rows that hold some: input_ids [b, T] -> logits [b, vocab] of the last.

        b is the batch compiled for, or len(rows) where `rows` names cache rows, in the order of input_ids. Padding
        is on the left, 0 in attention_mask [b, T]. Raises InputError (nothing is written) or CacheStateError.
        """
        prompt = self._checked(input_ids, attention_mask, rows, empty=False)
        seen = self.cache.seen_tokens
        slots = torch.tensor(prompt.rows, device=self.device)
        with self._writing(prompt.rows):
            for ids, pads in _chunks(prompt, self.chunk):
                columns = torch.arange(ids.shape[1], device=self.device)
                positions = (seen[slots][:, None] + columns - pads[:, None]).clamp_min(0)
                logits = self.prefill_graph(ids.contiguous(), positions, slots, seen, pads, *self.cache.flat)
                seen[slots] += ids.shape[1] - pads
            self.cache.longest = max(self.cache.longest, int(seen[slots].max()))
        return self._finish(logits, slots)

    @torch.no_grad()
    def decode(self, token_ids: Tensor, active: Tensor | None = None) -> Tensor:
        """Feed one token per row: token_ids [B, 1] -> logits [B, vocab].

        active: bool [B] on the device, None = all; an inactive row's cache and seen_tokens do not change and its
        logits are undefined. Raises InputError (nothing is written) or CacheStateError.
        """
        vocab_size = self.interface.vocab_size
        inputs.check_tokens(token_ids, batch_size=self.batch_size, vocab_size=vocab_size, device=self.device)
        if active is None:
            active = self._all_rows
        inputs.check_active(active, self.batch_size, self.device)
        self._require_valid(active)
        self._check_room(active)
        # contiguous: compiled code rests on strides, and callers cut tokens out of larger tensors
        return self.step(token_ids.long().contiguous(), active.contiguous())

    @torch.no_grad()
    def step(self, token_ids: Tensor, active: Tensor) -> Tensor:
        """decode without its checks: int64 tokens and rows that the loop of generate knows to be good."""
        self.cache.longest += 1
        with self._writing(active):
            logits = self._step(token_ids, active)
        return self._finish(logits, self._numbers, active)

    def reset(self, rows: Rows = None) -> None:
        """Empty all rows of the cache, or some; the others are not touched."""
        self.cache.reset(rows)

    def check_prompt(self, input_ids: Tensor, attention_mask: Tensor | None, *, empty: bool) -> None:
        """Raises what prefill would raise for this prompt, into an empty cache or the current one; writes nothing."""
        self._checked(input_ids, attention_mask, None, empty=empty)

    def _checked(self, input_ids: Tensor, attention_mask: Tensor | None, rows: Rows, *, empty: bool) -> inputs.Prompt:
        prompt = inputs.check_prompt(
            input_ids,
            attention_mask,
            rows,
            batch_size=self.batch_size,
            vocab_size=self.interface.vocab_size,
            device=self.device,
        )
        if not empty:
            self.cache.require_valid(prompt.rows)
        held = [0] * len(prompt.rows) if empty else self.cache.seen_tokens[prompt.rows].tolist()
        inputs.check_positions((h + n for h, n in zip(held, prompt.lengths, strict=True)), self.max_positions)
        pairs = [(h, n, min(n, self.chunk or n)) for h, n in zip(held, prompt.lengths, strict=True)]
        reached = (min(h + n - last, self.interface.held) + last for h, n, last in pairs)  # by the last chunk
        inputs.check_positions(reached, self.interface.max_places, "tokens held and new")
        return prompt

    def _require_valid(self, active: Tensor) -> None:
        if self.cache.broken_rows():
            self.cache.require_valid(active.nonzero().flatten().tolist())

    def _check_room(self, active: Tensor) -> None:
        """Positions, from what the host knows; the device is asked only once the fullest row may be full."""
        limit = self.max_positions
        if limit is not None and self.cache.longest + 1 > limit:
            seen = self.cache.seen_tokens
            inputs.check_positions([int((seen + active).max())], limit)
            self.cache.longest = int(seen.max())

    @contextmanager
    def _writing(self, rows: list[int] | Tensor) -> Iterator[None]:
        """From the first write on, whatever interrupts the call leaves its rows (or `active` [B]) marked invalid."""
        self.cache.changes += 1
        try:
            yield
        except BaseException:
            self.cache.mark_broken(rows.nonzero().flatten().tolist() if isinstance(rows, Tensor) else rows)
            raise

    def _finish(self, logits: Tensor, rows: Tensor, active: Tensor | None = None) -> Tensor:
        """The logits [b, vocab] of `rows` [b]; where asked to look, NaN in them breaks the (active) rows it is in."""
        if self._check_nan:
            bad = logits.isnan().any(-1)
            broken = rows[bad if active is None else bad & active].tolist()
            if broken:
                self.cache.mark_broken(broken)
                raise CacheStateError(must("logits", "numbers", f"NaN in rows {broken}", f"reset(rows={broken})"))
        return logits


def _chunks(prompt: inputs.Prompt, size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """ids [b, n] and pads [b] of each pass over a prompt: all of it, or chunks of `size` columns.

    Chunks are aligned at the right end, so the first is the one that is padded, and left padding changes nothing.
    """
    ids, pads = prompt.ids, prompt.pads
    if size is None:
        yield ids, pads
        return
    short = -ids.shape[1] % size
    ids, pads = nn.functional.pad(ids, (short, 0)), pads + short
    for start in range(0, ids.shape[1], size):
        yield ids[:, start : start + size], (pads - start).clamp(0, size)
