"""Each policy as a list of tokens, written from its formula: one row, one key/value head, nothing of ops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Token:
    """One token that is kept, or several merged; prompt: it came with a prompt; position: of the newest."""

    key: Tensor  # [D]
    value: Tensor  # [D]
    position: int
    prompt: bool
    score: float = 0.0
    weight: int = 1


@dataclass
class Listed:
    """A cache that keeps everything; subclasses say what leaves.

    margin: how close any choice between scores was; 0 after a tie. span: the window of the layer, in tokens.
    """

    budget: int
    scale: float
    span: int | None = field(default=None, kw_only=True)
    tokens: list[Token] = field(default_factory=list)
    seen: int = 0
    margin: float = math.inf

    def extend(self, q: Tensor, k: Tensor, v: Tensor, prompt: bool) -> Tensor:
        """q [r, n, D], k and v [n, D] -> [r, n, D]: all attend, then some leave."""
        old = len(self.tokens)
        new = [Token(k[j].double(), v[j].double(), self.seen + j, prompt) for j in range(k.shape[0])]
        self.tokens, self.seen = self.tokens + new, self.seen + len(new)
        keys, values = (torch.stack([getattr(t, name) for t in self.tokens]) for name in ("key", "value"))
        weights = torch.zeros(len(new), len(self.tokens), dtype=torch.float64)  # summed over r
        outs = []
        for j in range(len(new)):
            end = old + j + 1
            attention, out = self.attend(q[:, j].double(), keys[:end], values[:end])
            weights[j, :end] = attention.sum(0)
            outs.append(out)
        self.rate(weights, old, prompt)
        self.tokens = self.left(prompt)
        return torch.stack(outs, 1)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Attention [r, m] and output [r, D] of queries [r, D], which come with the last of self.tokens[:m]."""
        logits = self.logits(query, keys, len(keys) - 1)
        if self.span is not None:
            behind = torch.tensor([self.tokens[len(keys) - 1].position - t.position for t in self.tokens[: len(keys)]])
            logits = logits.masked_fill(behind >= self.span, -math.inf)
        attention = torch.softmax(logits, -1)
        return attention, attention @ values

    def logits(self, query: Tensor, keys: Tensor, mine: int) -> Tensor:
        """Of queries [r, D], which come with token `mine`, on the keys [m, D] of self.tokens[:m]."""
        return query @ keys.T * self.scale

    def left(self, prompt: bool) -> list[Token]:
        """What stays after a prompt or a step."""
        if self.span is not None:
            self.tokens = [token for token in self.tokens if self.seen - token.position < self.span]
        return self.kept() if len(self.tokens) > self.budget else self.tokens

    def rate(self, weights: Tensor, old: int, prompt: bool) -> None:
        """Set the scores, from the attention [n, tokens] that the new tokens paid to all."""

    def kept(self) -> list[Token]:
        return self.tokens

    def best(self, tokens: list[Token], count: int) -> list[Token]:
        """Those with the highest scores, in order of position; of equals the older goes."""
        ranked = sorted(tokens, key=lambda t: (t.score, t.position), reverse=True)
        if 0 < count < len(ranked):
            self.margin = min(self.margin, abs(ranked[count - 1].score - ranked[count].score))
        return sorted(ranked[:count], key=lambda t: t.position)


@dataclass
class H2O(Listed):
    recent: int = 1

    def rate(self, weights: Tensor, old: int, prompt: bool) -> None:
        for token, added in zip(self.tokens, weights.sum(0).tolist(), strict=True):
            token.score += added

    def kept(self) -> list[Token]:
        return self.best(self.tokens[: -self.recent], self.budget - self.recent) + self.tokens[-self.recent :]


@dataclass
class Streaming(Listed):
    """frequencies [D/2]: keys and queries are rotated here; slopes [r]: ALiBi. Distances are between places."""

    sinks: int = 0
    frequencies: Tensor | None = None
    slopes: Tensor | None = None

    def logits(self, query: Tensor, keys: Tensor, mine: int) -> Tensor:
        far = torch.tensor([self.distance(mine, other) for other in range(len(keys))])
        found = torch.stack([query @ rotated(key, -d, self.frequencies) for key, d in zip(keys, far, strict=True)], 1)
        found = found * self.scale - (0 if self.slopes is None else self.slopes.double()[:, None] * far)
        seen = torch.tensor([self.sees(mine, other) for other in range(len(keys))])
        return found.masked_fill(~seen, -math.inf)

    def distance(self, mine: int, other: int) -> float:
        return mine - other

    def sees(self, mine: int, other: int) -> bool:
        return True

    def kept(self) -> list[Token]:
        return self.tokens[: self.sinks] + self.tokens[len(self.tokens) - self.budget + self.sinks :]


@dataclass
class LESS(H2O):
    """sinks: those of streaming eviction, None: that of H2O; phi [r, D] -> [r, R] and psi [D] -> [R] in double."""

    sinks: int | None = None
    phi: Callable[[Tensor], Tensor] = field(kw_only=True)
    psi: Callable[[Tensor], Tensor] = field(kw_only=True)
    lost: list[Token] = field(default_factory=list)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Every lost token is attended to by phi(q) psi(k) instead of exp(logit); scores know only the held ones."""
        logits = self.logits(query, keys, len(keys) - 1)
        received = torch.softmax(logits, -1)
        if self.lost:
            features = torch.stack([self.psi(token.key) for token in self.lost])
            logits = torch.cat([logits, (self.phi(query) @ features.T).log()], -1)
            values = torch.cat([values, torch.stack([token.value for token in self.lost])])
        return received, torch.softmax(logits, -1) @ values

    def kept(self) -> list[Token]:
        kept = super().kept()
        if self.sinks is not None:
            kept = self.tokens[: self.sinks] + self.tokens[len(self.tokens) - self.budget + self.sinks :]
        self.lost += [token for token in self.tokens if all(token is not one for one in kept)]
        return kept


def hashed(number: int) -> int:
    """A 32-bit number from another, by Wellons's lowbias32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        number ^= number >> shift
        number = number * factor % 2**32
    return number ^ (number >> 16)


@dataclass
class CaM(Streaming):
    """seed: of layer 0, None: the expectation; head: which key/value head this is."""

    merged: int = 1
    seed: int | None = None
    head: int = 0

    def rate(self, weights: Tensor, old: int, prompt: bool) -> None:
        for token, attention in zip(self.tokens, weights[-1].tolist(), strict=True):
            token.score = attention

    def kept(self) -> list[Token]:
        kept = super().kept()
        takers = kept[self.sinks :][: self.merged]
        mean = sum(token.score for token in takers) / len(takers)
        for victim in self.tokens[self.sinks : len(self.tokens) - self.budget + self.sinks]:
            taken = min(1.0, victim.score / mean)
            if self.seed is not None:
                base = hashed(hashed(hashed(self.seed)) + self.head)
                draw = (hashed(base ^ victim.position) >> 8) / 2**24
                self.margin = min(self.margin, abs(draw - taken))
                taken = float(draw < taken)
            for token in takers:
                token.value = token.value + taken * victim.value / self.merged
        return kept


@dataclass
class KVMerger(H2O):
    top: int = 0
    fixed: bool = False
    threshold: float = 0.75
    sigma: float = 5.0
    normalized: bool = False

    def left(self, prompt: bool) -> list[Token]:
        if not prompt:
            return super().left(prompt)
        others, recent = self.tokens[: -self.recent], self.tokens[-self.recent :]
        high = self.best(others, self.top)
        rest = [token for token in others if all(token is not one for one in high)]
        merged = [self.merged(members) for members in self.sets(rest)]
        return sorted([*high, *merged], key=lambda token: token.position) + recent

    def sets(self, tokens: list[Token]) -> list[list[Token]]:
        """Contiguous ones, no more than there are slots."""
        cosines = [
            (float(torch.cosine_similarity(a.key, b.key, dim=0)), number)
            for number, (a, b) in enumerate(itertools.pairwise(tokens), 1)
        ]
        if not self.fixed:
            self.margin = min([self.margin, *(abs(cosine - self.threshold) for cosine, _ in cosines)])
            cosines = [pair for pair in cosines if pair[0] <= self.threshold]
        cosines.sort()
        cuts = self.budget - self.recent - self.top - 1
        if 0 < cuts < len(cosines):
            self.margin = min(self.margin, cosines[cuts][0] - cosines[cuts - 1][0])
        places = [0, *sorted(number for _, number in cosines[:cuts]), len(tokens)]
        return [tokens[start:stop] for start, stop in itertools.pairwise(places) if start < stop]

    def merged(self, members: list[Token]) -> Token:
        (pivot,) = self.best(members, 1)
        near = torch.stack([torch.exp(-(pivot.key - m.key).square().sum() / (2 * self.sigma**2)) for m in members])
        share = near / near.sum()
        key, value = (share @ torch.stack([getattr(m, name) for m in members]) for name in ("key", "value"))
        if not self.normalized:
            value = value * len(members)
        score, weight = sum(m.score for m in members), sum(m.weight for m in members)
        return Token(key, value, members[-1].position, True, score, weight)


@dataclass
class LMInfinite(Streaming):
    capped: bool = True

    @property
    def limit(self) -> int:
        return self.budget - self.sinks + 1

    def true(self, mine: int, other: int) -> int:
        return self.tokens[mine].position - self.tokens[other].position

    def distance(self, mine: int, other: int) -> float:
        return min(self.true(mine, other), self.limit if self.capped else 2**40)

    def sees(self, mine: int, other: int) -> bool:
        return self.true(mine, other) < self.limit or self.tokens[other].position < self.sinks


def rotated(x: Tensor, places: Tensor, frequencies: Tensor | None) -> Tensor:
    """x [D] turned by that many places, pairs i and i + D/2 being complex numbers."""
    if frequencies is None:
        return x
    pairs = torch.complex(*x.chunk(2)) * torch.exp(1j * places.double() * frequencies.double())
    return torch.cat([pairs.real, pairs.imag])


@dataclass
class SnapKV(Listed):
    window: int = 1
    kernel: int = 1
    pooling: str = "avg"

    def rate(self, weights: Tensor, old: int, prompt: bool) -> None:
        if not prompt:
            self.tokens[-1].score = -1.0
            return
        looked_at = weights[-self.window :].sum(0).tolist()
        n = len(self.tokens) - old
        for number, token in enumerate(self.tokens):
            column = number - old
            if 0 <= column < n - self.window:
                around = range(column - self.kernel // 2, column + self.kernel // 2 + 1)
                found = [looked_at[old + c] if 0 <= c < n - self.window else 0.0 for c in around]
                token.score = max(found) if self.pooling == "max" else sum(found) / self.kernel
            else:
                token.score = looked_at[number]

    def kept(self) -> list[Token]:
        return self.best(self.tokens[: -self.window], self.budget - self.window) + self.tokens[-self.window :]
