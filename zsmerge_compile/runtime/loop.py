"""The decode loop of `generate` where nobody has to see each token: the tokens stay on the device.

transformers' own loop asks the device after every step whether a row is still active, and so waits for it. Here the
rows' state lives beside the tokens, and the host reads it every few steps. Until then a row that has stopped is
inactive, which leaves its cache as it is, and its columns hold pads: steps made after the last row has stopped leave
no trace, and their columns are cut off. Sequences, scores and logits equal those of transformers' loop, with the same
draws of the random generator, of which the extra steps may consume more (never on a CPU, where reading costs nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsmerge_compile.errors import CacheStateError, must
from zsmerge_compile.runtime.stopping import Stops

# device type -> steps from one look at the rows' state to the next; any other device: OTHER_DEVICES
STEPS_BETWEEN_LOOKS = {"cpu": 1}
OTHER_DEVICES = 8
_ROOM = 4096  # columns allocated at first: a caller's max_new_tokens may be a number that is never reached

Processor = Callable[[Tensor, Tensor], Tensor]


class Wanted(NamedTuple):
    """What generate was asked for. pad: a scalar tensor; keep_scores, keep_logits: those of every step."""

    stops: Stops
    processors: Collection[Processor]
    do_sample: bool
    pad: Tensor
    keep_scores: bool
    keep_logits: bool


class Generated(NamedTuple):
    """columns [B, T + n], the prompt first; sampled [B]: tokens of each row before its pads; n scores and logits."""

    columns: Tensor
    sampled: Tensor
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None


def decode_loop(
    step: Callable[[Tensor, Tensor], Tensor], cache: Any, prompt: Tensor, logits: Tensor, wanted: Wanted
) -> Generated:
    """Writes columns after `prompt` [B, T], until all rows have stopped.

    step    (token_ids [B, 1], active bool [B]) -> logits [B, vocab]; an inactive row is not changed, its logits are
            undefined
    cache   its seen_tokens are [B]: the tokens fed to each row, those of the prompt included
    logits  [B, vocab] of the prompt's last column

    Raises CacheStateError where sampling meets NaN.
    """
    fed = cache.seen_tokens.clone()
    columns, draw, kept = Columns(prompt, wanted.stops.width), Draw(wanted.do_sample, prompt), Kept(wanted)
    rows = Rows(wanted, prompt, logits.shape[1], int(fed.max()))
    every = rows.steps_between_looks(wanted.processors)
    logits = logits.to(torch.float32, copy=True)
    last = max(wanted.stops.width - prompt.shape[1], 1)
    for number in range(1, last + 1):
        scores = logits
        for processor in wanted.processors:
            scores = processor(columns.view(), scores)
        kept.add(scores, logits)
        tokens = rows.pad_stopped(draw(scores))
        columns.append(tokens)
        rows.take(tokens, cache)
        if number % every == 0 or number == last:
            draw.check(cache)
            if number == last or rows.all_stopped():
                break
        logits = rows.only_active(step(rows.fed(tokens)[:, None], rows.active).float())
    return _finished(columns.view(), prompt.shape[1], cache.seen_tokens - fed + 1, kept, wanted.stops)


def _finished(columns: Tensor, prompt: int, sampled: Tensor, kept: Kept, stops: Stops) -> Generated:
    """Without the columns that hold nothing but pads; sampled [B], as all of a row's tokens but the last were fed."""
    count = int(sampled.max())
    written = columns[:, : prompt + count].clone(memory_format=torch.contiguous_format)
    for seen in (written[:, :-1], written):
        stops.remind(seen, None)
    return Generated(written, sampled, kept.first(kept.scores, count), kept.first(kept.logits, count))


class Columns:
    """ids [B, K], written column by column in place."""

    def __init__(self, ids: Tensor, width: int) -> None:
        self._width = ids.shape[1]
        self._store = ids.new_empty(ids.shape[0], min(width, self._width + _ROOM), dtype=torch.int64)
        self._store[:, : self._width] = ids

    def view(self) -> Tensor:
        return self._store[:, : self._width]

    def append(self, tokens: Tensor) -> None:
        """tokens [B]"""
        if self._width == self._store.shape[1]:
            self._store = torch.cat([self._store, torch.empty_like(self._store)], 1)
        self._store[:, self._width] = tokens
        self._width += 1


class Draw:
    """scores [B, vocab] -> tokens [B], without a word to the host."""

    def __init__(self, do_sample: bool, like: Tensor) -> None:
        self._do_sample = do_sample
        self._not_numbers = torch.zeros(like.shape[0], dtype=torch.bool, device=like.device)

    def __call__(self, scores: Tensor) -> Tensor:
        if not self._do_sample:
            return scores.argmax(-1)
        chances = torch.softmax(scores, -1)
        self._not_numbers |= chances[:, 0].isnan()  # one NaN makes a whole row of softmax NaN
        # torch.multinomial draws one sample in this way (the race of exponentials), but asks the device for NaN first
        return (chances / torch.empty_like(chances).exponential_(1.0)).argmax(-1)

    def check(self, cache: Any) -> None:
        """Waits for the device where it samples; where there was NaN, marks the rows and raises CacheStateError."""
        if self._do_sample and bool(self._not_numbers.any()):
            rows = self._not_numbers.nonzero().flatten().tolist()
            cache.mark_broken(rows)
            hint = f"reset(rows={rows}), or compile with check_nan=True to hear of it at once"
            raise CacheStateError(must("scores to sample from", "numbers", f"NaN in rows {rows}", hint))


class Kept:
    """The scores and logits [B, vocab] of every step, where a caller asked for them."""

    def __init__(self, wanted: Wanted) -> None:
        self.scores: list[Tensor] | None = [] if wanted.keep_scores else None
        self.logits: list[Tensor] | None = [] if wanted.keep_logits else None

    def add(self, scores: Tensor, logits: Tensor) -> None:
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)

    @staticmethod
    def first(record: list[Tensor] | None, count: int) -> tuple[Tensor, ...] | None:
        return None if record is None else tuple(record[:count])


class Rows:
    """Which rows are active: bool [B] on the device. `active` is the same tensor where no row can stop on its own."""

    def __init__(self, wanted: Wanted, prompt: Tensor, vocab: int, longest: int) -> None:
        ends, limit = wanted.stops.ends, wanted.stops.max_positions
        self._ends = None if ends is None else ends.to(prompt.device)
        self._limit = limit if limit is not None and longest + wanted.stops.width - prompt.shape[1] > limit else None
        self._can_stop = self._ends is not None or self._limit is not None
        self._stopped = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        self._pad = wanted.pad.to(prompt.device)
        self._pad_is_a_token = self._can_stop and 0 <= int(self._pad) < vocab
        self.active = ~self._stopped

    def steps_between_looks(self, processors: Collection[Processor]) -> int:
        """1 where a step too many would show processors a column of pads that they cannot look up in the vocabulary."""
        if processors and self._can_stop and not self._pad_is_a_token:
            return 1
        return STEPS_BETWEEN_LOOKS.get(self._pad.device.type, OTHER_DEVICES)

    def pad_stopped(self, tokens: Tensor) -> Tensor:
        """A pad in the place of what was drawn for rows that had stopped."""
        return torch.where(self._stopped, self._pad, tokens) if self._can_stop else tokens

    def take(self, tokens: Tensor, cache: Any) -> None:
        """tokens [B]: the column that some rows may stop with."""
        if self._ends is not None:
            self._stopped = self._stopped | (tokens[:, None] == self._ends).any(1)
        if self._limit is not None:
            self._stopped = self._stopped | (cache.seen_tokens >= self._limit)
        if self._can_stop:
            self.active = ~self._stopped

    def all_stopped(self) -> bool:
        """Waits for the device where a row can stop."""
        return self._can_stop and bool(self._stopped.all())

    def fed(self, tokens: Tensor) -> Tensor:
        """tokens [B] for the next step: a pad may be any number."""
        return tokens if self._pad_is_a_token or not self._can_stop else tokens.masked_fill(self._stopped, 0)

    def only_active(self, logits: Tensor) -> Tensor:
        """logits [B, vocab], zeros in inactive rows: a NaN there would fail the sampling of the others."""
        return logits.masked_fill_(self._stopped[:, None], 0.0) if self._can_stop else logits
