"""ZSMerge written from the paper (Algorithm 1, eqs. 2-8) as lists of tokens: slow, and independent of what it checks.

Nothing here imports zsmerge_compile.passes or zsmerge_compile.ops. There are no slots, no ring buffer and no masks:
a head of the cache is three lists, a token moves from one to the next, and a row sees only its own real tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zsmerge_compile.testing.attention_hook import Alibi, alibi_of, kv_heads_of, replaced_attention

Split = tuple[int, int, int]  # proximity, context, residual


@dataclass(slots=True)
class Entry:
    """A token, or the running mean of the tokens merged into one."""

    key: Tensor  # [D]
    value: Tensor  # [D]
    newest: int  # position of its newest member
    mean_position: float
    weight: int = 1  # tokens it stands for
    score: float = 0.0  # eq. 5; of residual entries it decides nothing, and a merge adds the scores up


def mean_of(entries: Sequence[Entry]) -> Entry:
    """The weighted mean of entries (eq. 7 for any number of tokens at once)."""
    weight = sum(e.weight for e in entries)
    return Entry(
        key=torch.stack([e.weight * e.key for e in entries]).sum(0) / weight,
        value=torch.stack([e.weight * e.value for e in entries]).sum(0) / weight,
        newest=max(e.newest for e in entries),
        mean_position=sum(e.weight * e.mean_position for e in entries) / weight,
        weight=weight,
        score=sum(e.score for e in entries),
    )


@dataclass
class Head:
    """The cache of one batch row and one KV head.

    margin is the closest any decision so far has been, relative to the numbers compared: another implementation may
    rightly decide otherwise once this falls to rounding error. It is 0 after a true tie.
    """

    split: Split
    alpha: float = 1.0
    decay: float = 0.98
    merge: Literal["segment", "sequential"] = "segment"
    window: int | None = None
    alibi: Alibi | None = None
    dtype: torch.dtype = torch.float32
    ring: list[Entry] = field(default_factory=list)  # in order of position
    context: list[Entry] = field(default_factory=list)  # in order of position
    residual: list[Entry] = field(default_factory=list)  # in order of opening
    margin: float = math.inf

    @property
    def entries(self) -> list[Entry]:
        """Everything the cache holds."""
        return self.residual + self.context + self.ring

    def extend(self, q: Tensor, k: Tensor, v: Tensor, positions: Sequence[int], scale: float | None = None) -> Tensor:
        """Attend, score and compress for n new tokens: q [rep, n, D], k and v [n, D] -> [rep, n, D].

        rep query heads share this KV head. positions are those of the new tokens, and end just before the position
        of the next token to come. scale defaults to 1 / sqrt(D).
        """
        q, k, v = (x.to(self.dtype, copy=True) for x in (q, k, v))
        new = [Entry(k[j], v[j], position, float(position)) for j, position in enumerate(positions)]
        out = self._attend(q, new, 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
        self._compress(new, next_position=new[-1].newest + 1)
        return out

    def _attend(self, q: Tensor, new: list[Entry], scale: float) -> Tensor:
        """Eqs. 8 and 5, one new token after the other: each sees the cache as it was and the new ones up to itself."""
        live = self.entries + new
        keys, values = torch.stack([e.key for e in live]), torch.stack([e.value for e in live])
        added = torch.tensor([self.alpha * math.log(e.weight) for e in live], dtype=self.dtype)
        if self.alibi is not None:
            places, weights = [e.mean_position for e in live], [e.weight for e in live]
            added = added + self.alibi(places, weights, q.shape[-1])
        scores = torch.tensor([e.score for e in live], dtype=self.dtype)
        out = []
        for j, token in enumerate(new):
            end = len(live) - len(new) + j + 1
            logits = q[:, j] @ keys[:end].T * scale + added[..., :end]
            hidden = [self._expired(e, token.newest) for e in live[:end]]
            attention = logits.masked_fill(torch.tensor(hidden), -math.inf).softmax(-1)
            out.append(attention @ values[:end])
            scores[:end] = self.decay * scores[:end] + attention.sum(0)
        for entry, score in zip(live, scores.tolist(), strict=True):
            entry.score = score
        return torch.stack(out, dim=1)

    def _expired(self, entry: Entry, position: int) -> bool:
        """A token at `position` no longer sees `entry`."""
        return self.window is not None and position - entry.newest >= self.window

    def _compress(self, new: list[Entry], next_position: int) -> None:
        """Algorithm 1, lines 6-18, for any number of new tokens. What no later token can see goes first."""
        proximity, context, residual = self.split
        ring, candidates, self.residual = (
            [e for e in entries if not self._expired(e, next_position)]
            for entries in (self.ring + new, self.context, self.residual)
        )
        self.ring, left = ring[-proximity:], ring[:-proximity]
        ranked = sorted(candidates + left, key=lambda e: (e.score, e.newest), reverse=True)  # of equals the oldest goes
        self.context = sorted(ranked[:context], key=lambda e: e.newest)
        leaving = sorted(ranked[context:], key=lambda e: e.newest)
        if leaving and context:
            self._decided(ranked[context - 1].score, ranked[context].score)
        if leaving and residual:
            for group in self._groups(leaving):
                self._absorb(mean_of(group))

    def _groups(self, leaving: list[Entry]) -> list[list[Entry]]:
        """Contiguous groups that become one each: single tokens, or as many near-equal ones as there are slots."""
        count = len(leaving) if self.merge == "sequential" else min(len(leaving), self.split[2])
        size, larger = divmod(len(leaving), count)
        rest = iter(leaving)
        return [[next(rest) for _ in range(size + (i < larger))] for i in range(count)]

    def _absorb(self, entry: Entry) -> None:
        """Into a free place of the residual if there is one, else eqs. 6 and 7."""
        if len(self.residual) < self.split[2]:
            self.residual.append(entry)
            return
        products = [float(slot.key @ entry.key) for slot in self.residual]
        best = products.index(max(products))  # the first of equals: opened first
        if len(products) > 1:
            self._decided(*sorted(products)[-2:])
        self.residual[best] = mean_of([self.residual[best], entry])

    def _decided(self, one: float, other: float) -> None:
        self.margin = min(self.margin, abs(one - other) / max(abs(one), abs(other), 1e-30))


class Oracle:
    """An untouched model whose attention is ZSMerge on lists, with the calls of CompiledModel.

    splits and windows: one per layer, already resolved. call and kv_heads are needed for a model that is not from
    transformers: call(model, input_ids, attention_mask, position_ids) -> logits [B, vocab] of the last column.
    heads[layer][row][kv_head] is the state, seen[row] the number of real tokens so far, outputs[layer] what attention
    gave in the latest call, [b, H, n, D]. dtype is that of the lists; float64 tells rounding error from a difference
    in method.
    """

    def __init__(
        self,
        model: nn.Module,
        splits: Sequence[Split],
        windows: Sequence[int | None] | None = None,
        alpha: float = 1.0,
        decay: float = 0.98,
        merge: Literal["segment", "sequential"] = "segment",
        batch: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        kv_heads: int | None = None,
        call: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.splits, self.batch = model, list(splits), batch
        self.windows = [None] * len(self.splits) if windows is None else list(windows)
        self.kv_heads = kv_heads_of(model.config) if kv_heads is None else kv_heads
        self._settings: dict[str, Any] = dict(alpha=alpha, decay=decay, merge=merge, dtype=dtype)
        self._alibi = alibi_of(model, self.kv_heads)
        self._call = _last_logits if call is None else call
        self.outputs: list[Tensor] = []
        self.heads: list[list[list[Head]]] = [[[] for _ in range(batch)] for _ in self.splits]
        self.seen = [0] * batch
        self.reset()

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget all rows, or some."""
        for row in range(self.batch) if rows is None else rows:
            self.seen[row] = 0
            for layer, split, window in zip(self.heads, self.splits, self.windows, strict=True):
                layer[row] = [Head(split, window=window, alibi=alibi, **self._settings) for alibi in self._alibi]

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        chunk: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """[b, T] tokens, left-padded, to rows (all by default) -> logits [b, vocab] of the last column.

        chunk None takes the prompt in one go ("full"). Otherwise it goes through in blocks of `chunk` columns, of
        which the first may be shorter ("chunked").
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        chosen = list(range(self.batch) if rows is None else rows)
        columns = input_ids.shape[1]
        ends = [columns] if chunk is None else range(columns % chunk or chunk, columns + 1, chunk)
        start, logits = 0, torch.empty(0)
        for end in ends:
            logits = self._forward(input_ids[:, start:end], mask[:, start:end], chosen)
            start = end
        return logits

    def decode(self, token_ids: Tensor, active: Tensor | None = None) -> Tensor:
        """[B, 1] tokens -> logits [B, vocab]; rows whose `active` [B] is False keep their state, get no real logits."""
        mask = torch.ones_like(token_ids) if active is None else active.long()[:, None]
        return self._forward(token_ids, mask, list(range(self.batch)))

    @property
    def margin(self) -> float:
        """The closest any decision of any head has been, see Head."""
        return min(head.margin for layer in self.heads for row in layer for head in row)

    @torch.no_grad()
    def _forward(self, input_ids: Tensor, mask: Tensor, rows: list[int]) -> Tensor:
        """The model's own forward over new columns [b, n]; its attention calls come layer by layer."""
        first = torch.tensor([self.seen[row] for row in rows], device=mask.device)[:, None]
        positions = (first + mask.cumsum(-1) - 1).clamp(min=0)
        layers = iter(self.heads)
        self.outputs = []

        def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            layer = next(layers, None)
            if layer is None:
                raise RuntimeError(f"attention calls must be one for each of {len(self.heads)} layers, got more")
            out = torch.zeros_like(q)
            for b, row in enumerate(rows):
                real = mask[b].bool()
                if real.any():  # a row of padding sees nothing and leaves its heads alone
                    new = q[b, :, real].cpu(), k[b, :, real].cpu(), v[b, :, real].cpu()
                    out[b, :, real] = _extend_row(layer[row], *new, positions[b, real].tolist(), scale).to(q)
            self.outputs.append(out)
            return out

        with replaced_attention(self.model, attention, self.kv_heads):
            logits = self._call(self.model, input_ids, mask, positions)
        if next(layers, None) is not None:
            raise RuntimeError(f"attention calls must be one for each of {len(self.heads)} layers, got fewer")
        for b, row in enumerate(rows):
            self.seen[row] += int(mask[b].sum())
        return logits


def _extend_row(heads: list[Head], q: Tensor, k: Tensor, v: Tensor, positions: list[int], scale: float) -> Tensor:
    """One row's new tokens: q [H, n, D], k and v [G, n, D] -> [H, n, D]."""
    groups = q.chunk(len(heads))  # neighbouring query heads share a KV head
    return torch.cat([head.extend(groups[g], k[g], v[g], positions, scale) for g, head in enumerate(heads)])


def _last_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    out = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    logits: Tensor = out.logits[:, -1]
    return logits
