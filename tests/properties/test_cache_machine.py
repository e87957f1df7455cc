"""The cache as one state machine: prompts, steps and resets in any order, and what must hold after each of them.

What runs (`ops.decode`, `ops.prefill`) is followed by the list-based oracle, one per row and key/value head, and by a
cache of one row that sees neither the other rows nor any padding.
"""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from tests.properties.layer import Layer, copy, part
from tests.states import Slot, assert_same_slots, residuals, singles, slots_of
from tests.strategies import Case, Tokens, cases, tokens
from zsmerge_compile.testing.attention_hook import Alibi
from zsmerge_compile.testing.oracle import Head
from zsmerge_compile.testing.tolerance import DECISION, OP_FP32

LONGEST_PROMPT = 20  # beyond it scores leave out queries they would no longer feel (by at most 1e-6)


class UnroundedAlibi(Alibi):
    """A bias that no bfloat16 has touched."""

    def __call__(self, positions: list[float], weights: list[int], head_dim: int) -> Tensor:
        return self.slopes * torch.tensor(positions) / head_dim**0.5


class CacheMachine(RuleBasedStateMachine):
    @initialize(case=cases())
    def start(self, case: Case) -> None:
        self.case, self.generator = case, case.generator()
        self.groups = case.layout.kv_heads
        self.layer = Layer(case)
        self.alone = [Layer(case._replace(batch=1)) for _ in range(case.batch)]
        self.heads: dict[int, list[Head]] = {}
        self.followed: set[tuple[int, int]] = set()
        self.sums = torch.zeros(case.batch, self.groups, 2 * case.layout.head_dim + 1, dtype=torch.float64)
        self.norms = torch.zeros(case.batch, self.groups, 3, dtype=torch.float64)
        for row in range(case.batch):
            self._forget(row)

    @rule(n=st.integers(1, LONGEST_PROMPT), data=st.data())
    def prompt(self, n: int, data: st.DataObject) -> None:
        """A first prompt or a further one, for some rows in any order, padded on the left; a row may be all padding."""
        order = data.draw(st.permutations(range(self.case.batch)), label="order")
        rows = list(order[: data.draw(st.integers(1, self.case.batch), label="rows")])
        pads = [data.draw(st.integers(0, n), label="pads") for _ in rows]
        new, before = tokens(self.case, len(rows), n, self.generator), copy(self.layer.state)
        out = self.layer.extend(new, pads, rows)
        assert not any(out[i, :, :pad].any() for i, pad in enumerate(pads))
        for i, (row, pad) in enumerate(zip(rows, pads, strict=True)):
            if pad < n:
                mine = part(new, pad, n, i)
                self._follow(row, mine, out[i : i + 1, :, pad:], self.alone[row].extend(mine))
        self._kept(before, [row for i, row in enumerate(rows) if pads[i] < n])

    @rule(steps=st.integers(1, 6), data=st.data())
    def decode(self, steps: int, data: st.DataObject) -> None:
        """A few tokens for those rows that are active."""
        flags = data.draw(st.lists(st.booleans(), min_size=self.case.batch, max_size=self.case.batch), label="active")
        active = torch.tensor(flags)
        rows, before = active.nonzero().flatten().tolist(), copy(self.layer.state)
        for _ in range(steps):
            new = tokens(self.case, self.case.batch, 1, self.generator)
            out = self.layer.decode(new, active)
            for row in rows:
                mine = part(new, 0, 1, row)
                self._follow(row, mine, out[row : row + 1], self.alone[row].decode(mine))
            self.follows_the_oracle_and_the_row_alone()
        self._kept(before, rows)

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, self.case.batch - 1), label="row")
        self.layer.reset([row])
        self.alone[row].reset([0])
        self._forget(row)

    @invariant()
    def follows_the_oracle_and_the_row_alone(self) -> None:
        """Slot for slot; a decision nearer than DECISION may fall either way and ends the comparison of its head."""
        for row, g in sorted(self.followed):
            ours, head = self._slots(row, g), self.heads[row][g]
            try:
                for one, other in zip(ours, slots_of(head), strict=True):
                    assert_same_slots(one, other)
                for one, other in zip(ours, self._slots(0, g, self.alone[row]), strict=True):
                    assert_same_slots(one, other)
            except AssertionError:
                if head.margin >= DECISION:
                    raise
                self.followed.remove((row, g))

    @invariant()
    def ring_holds_the_latest_tokens(self) -> None:
        ring = self.case.rule.proximity + 1
        for row, g in self._all_heads():
            seen, weight = int(self.layer.seen[row]), self.layer.state.weight[row, g, :ring]
            kept = min(self.case.rule.proximity, seen, (self.case.rule.window or seen + 1) - 1)
            held = sorted(self.layer.state.position[row, g, :ring][weight > 0].tolist())
            assert held == list(range(seen - kept, seen))
            assert weight[seen % ring] == 0, "the next token's slot must be free"

    @invariant()
    def weights_count_tokens(self) -> None:
        size = self.case.layout.residual
        weight, singles = self.layer.state.weight, self.case.layout.slots - size
        assert ((weight[..., :singles] == 0) | (weight[..., :singles] == 1)).all()
        live = (weight > 0).sum(-1)
        assert (live <= self.case.layout.budget).all()
        seen = self.layer.seen[:, None].expand(-1, self.groups)
        if self.case.rule.window is None:
            assert torch.equal(live, seen.clamp_max(self.case.layout.budget))
            assert not size or torch.equal(weight.sum(-1).long(), seen)

    @invariant()
    def first_moments_are_conserved(self) -> None:
        """Of keys, values and positions; the error is relative to the sum of the tokens' norms."""
        if self.case.rule.window is not None or not self.case.layout.residual:
            return
        state, dim = self.layer.state, self.case.layout.head_dim
        at = self.case.layout.slots - self.case.layout.residual
        keys, values = (torch.cat([t[:, :, :at], m], 2) for t, m in zip(state[:2], state[5:7], strict=True))
        places = torch.cat([state.position[:, :, :at].float(), state.residual_position], 2)
        held = torch.cat([keys, values, places[..., None]], -1).double() * state.weight[..., None].double()
        error = (held.sum(2) - self.sums).split([dim, dim, 1], -1)
        for e, norm in zip(error, self.norms.unbind(-1), strict=True):
            assert (e.norm(dim=-1) <= OP_FP32 * norm).all()

    @invariant()
    def nothing_expired_is_live(self) -> None:
        if self.case.rule.window is not None:
            age = self.layer.seen[:, None, None] - self.layer.state.position
            assert not ((self.layer.state.weight > 0) & (age >= self.case.rule.window)).any()

    @invariant()
    def everything_is_finite(self) -> None:
        assert all(tensor.isfinite().all() for tensor in self.layer.state)

    def _all_heads(self) -> list[tuple[int, int]]:
        return [(row, g) for row in range(self.case.batch) for g in range(self.groups)]

    def _slots(self, row: int, g: int, layer: Layer | None = None) -> tuple[list[Slot], list[Slot]]:
        state = (layer or self.layer).state
        return singles(state, row, g), residuals(state, row, g)

    def _follow(self, row: int, mine: Tokens, out: Tensor, alone: Tensor) -> None:
        """The oracle takes the row's new tokens [1, ., n, D]; both of the cache's outputs must be its own."""
        n = mine.query.shape[2]
        places = range(int(self.layer.seen[row]) - n, int(self.layer.seen[row]))
        queries = mine.query[0].chunk(self.groups)
        for g, head in enumerate(self.heads[row]):
            expected = head.extend(queries[g], mine.key[0, g], mine.value[0, g], places, self.case.rule.scale)
            if (row, g) in self.followed:
                for found in (out, alone):
                    torch.testing.assert_close(found[0].chunk(self.groups)[g], expected, atol=OP_FP32, rtol=OP_FP32)
        rows = torch.cat([mine.key[0], mine.value[0]], -1).double()
        at = torch.tensor([float(p) for p in places], dtype=torch.float64).expand(self.groups, -1)
        self.sums[row] += torch.cat([rows, at[..., None]], -1).sum(1)
        norms = [t.norm(dim=-1) for t in rows.chunk(2, -1)]
        self.norms[row] += torch.stack([*norms, at], -1).sum(1)

    def _kept(self, before: tuple[Tensor, ...], but: list[int]) -> None:
        """Rows that took no part hold what they held, to the bit."""
        others = [row for row in range(self.case.batch) if row not in but]
        assert all(torch.equal(was[others], now[others]) for was, now in zip(before, self.layer.state, strict=True))

    def _forget(self, row: int) -> None:
        rule, layout = self.case.rule, self.case.layout
        biases = [None] * self.groups
        if rule.slopes is not None:
            kind = Alibi if rule.alibi_bf16 else UnroundedAlibi
            biases = [kind(slopes, torch.float32) for slopes in rule.slopes.chunk(self.groups)]
        split = (layout.proximity, layout.context, layout.residual)
        self.heads[row] = [Head(split, rule.alpha, rule.decay, rule.merge, rule.window, bias) for bias in biases]
        self.followed |= {(row, g) for g in range(self.groups)}
        self.sums[row], self.norms[row] = 0.0, 0.0


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
