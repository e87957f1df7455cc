"""What follows from the paper's rules, on one layer and without a model: SPEC section 1, one test per consequence.

The cache as a state machine (ring, weights, moments, rows, padding) is in test_cache_machine.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.properties.layer import Layer, copy, full_attention, part, random_tokens
from tests.states import assert_same_slots, assert_same_states, residuals, singles
from tests.strategies import Case, Tokens, cases
from zsmerge_compile.ops import decode
from zsmerge_compile.ops.state import LayerLayout, Rule
from zsmerge_compile.testing.oracle import Head
from zsmerge_compile.testing.tolerance import DECISION, OP_FP32

few = settings(max_examples=25, deadline=None)
plain = cases(windows=False, alibi=False)


def unrounded(case: Case) -> Case:
    return case._replace(rule=replace(case.rule, alibi_bf16=False))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=OP_FP32, rtol=OP_FP32)


# --- until the budget is full, and just after


@few
@given(case=cases(windows=False).map(unrounded), data=st.data())
def test_the_first_budget_plus_one_outputs_are_full_attention(case: Case, data: st.DataObject) -> None:
    """However the tokens come, and every weight is 1 until the first merge ends step budget + 1."""
    budget = case.layout.budget
    new, layer = random_tokens(case, budget + 1), Layer(case)
    expected, _ = full_attention(new, case.rule)
    out = layer.feed(part(new, 0, budget), first=data.draw(st.integers(0, budget)))
    close(out, expected[:, :, :budget])
    assert (layer.state.weight.sort(-1).values == torch.tensor([0.0] + [1.0] * budget)).all()
    close(layer.decode(part(new, budget, budget + 1)), expected[:, :, budget:])
    merged = (layer.state.weight == 2).sum(-1)
    assert (merged == (1 if case.layout.residual else 0)).all()


# --- Theorem 3.1


@few
@given(
    case=cases(windows=False, min_residual=1).map(unrounded),
    first=st.integers(0, 40),
    steps=st.integers(1, 40),
    alpha=st.floats(0, 1),
    loud=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_an_unmerged_token_loses_no_attention(case: Case, first: int, steps: int, alpha: float, loud: float) -> None:
    """For any query, however many tokens were merged (eq. 8; `loud` scales the query)."""
    case = case._replace(rule=replace(case.rule, alpha=alpha))
    n = first + steps
    new, layer = random_tokens(case, n + 1), Layer(case)
    layer.feed(part(new, 0, n), first)
    query = new._replace(query=new.query * loud)
    _, weights = full_attention(query, case.rule)
    last = part(query, n, n + 1)
    entering = (layer.seen % (case.rule.proximity + 1))[:, None, None].expand(-1, case.layout.kv_heads, 1)
    is_new = torch.arange(case.layout.slots) == entering
    at = torch.full((case.batch, 1, 1), n, dtype=torch.int32)
    bias = decode.slot_bias(layer.state, at, is_new, last.query.dtype, case.rule)
    _, mass = decode.attend(layer.state, *last, bias, entering, case.rule)  # [B, G, S] summed over a group's heads
    single = (layer.state.weight == 1) | is_new
    place = torch.where(is_new, n, layer.state.position).long()
    in_full = weights[:, :, -1].unflatten(1, (case.layout.kv_heads, -1)).sum(2).gather(2, place)
    assert (mass >= in_full - OP_FP32)[single].all()


# --- what stays


def drawn_to_one(case: Case, n: int, strong: int) -> Tokens:
    """Random tokens, but every query is drawn to token `strong` and to no other."""
    new = random_tokens(case, n)
    direction = torch.tensor([1.0, 0.0, 0.0, 0.0])
    query, key = new.query * (1 - direction) + 4 * direction, new.key * (1 - direction)
    key[:, :, strong] += 4 * direction
    return Tokens(query, key, new.value)


@few
@given(case=plain, data=st.data())
def test_the_sink_survives_a_prompt_shorter_than_the_budget(case: Case, data: st.DataObject) -> None:
    assume(case.layout.context)
    budget = case.layout.budget
    new, layer = drawn_to_one(case, 3 * budget + 5, strong=0), Layer(case)
    layer.feed(new, first=data.draw(st.integers(0, budget - 1)))
    first = (layer.state.weight > 0) & (layer.state.position == 0)
    assert (first.sum(-1) == 1).all() and (layer.state.weight[first] == 1).all()


@few
@given(case=cases(windows=False, alibi=False, decays=(0.0, 0.5)), data=st.data())
def test_a_generated_token_wins_a_context_slot_from_a_prompt_token(case: Case, data: st.DataObject) -> None:
    """At most 1/2 of the decay, so that what the prompt's tokens were once given is soon forgotten."""
    assume(case.layout.context)
    proximity, prompt = case.rule.proximity, case.layout.budget + data.draw(st.integers(0, 20))
    new, layer = drawn_to_one(case, prompt + proximity + 1, strong=prompt), Layer(case)
    layer.feed(part(new, 0, prompt), first=prompt)
    layer.decode(part(new, prompt, prompt + 1))
    before = layer.state.position[:, :, proximity + 1 :][:, :, : case.rule.context].clone()
    assert (before < prompt).all(), "the context is full of prompt tokens"
    layer.feed(part(new, prompt + 1, prompt + 1 + proximity))
    won = (layer.state.position == prompt) & (layer.state.weight == 1)
    assert won[:, :, proximity + 1 : proximity + 1 + case.rule.context].any(-1).all()


# --- no residual: eviction, and H2O


@few
@given(case=plain, first=st.integers(0, 30), steps=st.integers(1, 30))
def test_without_residual_tokens_are_kept_as_they_are_or_not_at_all(case: Case, first: int, steps: int) -> None:
    """And alpha, which weighs merged tokens, has no say."""
    case = case._replace(layout=replace(case.layout, residual=0))
    n, new = first + steps, random_tokens(case, first + steps)
    layer, other = (Layer(case._replace(rule=replace(case.rule, alpha=alpha))) for alpha in (1.0, 0.0))
    assert torch.equal(layer.feed(new, first), other.feed(new, first))
    for row in range(case.batch):
        for g in range(case.layout.kv_heads):
            kept = singles(layer.state, row, g)
            assert len(kept) == min(n, case.layout.budget) and {slot.weight for slot in kept} == {1.0}
            assert all(torch.equal(slot.key, new.key[row, g, slot.newest]) for slot in kept)
            assert all(torch.equal(slot.value, new.value[row, g, slot.newest]) for slot in kept)


class H2O:
    """Heavy-hitter oracle (Zhang et al. 2023) of one head: newest tokens, and those with most attention so far."""

    def __init__(self, recent: int, heavy: int) -> None:
        self.recent, self.heavy = recent, heavy
        self.total: dict[int, float] = {}
        self.gap = float("inf")  # the closest any choice has been

    def step(self, query: Tensor, key: Tensor, value: Tensor, t: int, scale: float) -> Tensor:
        """Token t attends to what is kept: query [r, n, D], key and value [n, D] of all tokens -> [r, D]."""
        self.total[t] = 0.0
        kept = sorted(self.total)
        attention = (query[:, t] @ key[kept].T * scale).softmax(-1)
        for place, got in zip(kept, attention.sum(0).tolist(), strict=True):
            self.total[place] += got
        if len(kept) > self.recent + self.heavy:
            by_total = sorted(kept[: -self.recent], key=lambda place: self.total[place])
            if len(by_total) > 1:
                low, high = (self.total[place] for place in by_total[:2])
                self.gap = min(self.gap, (high - low) / high)
            del self.total[by_total[0]]
        return attention @ value[kept]


@few
@given(case=plain, steps=st.integers(1, 40))
def test_without_residual_and_decay_it_is_h2o(case: Case, steps: int) -> None:
    case = case._replace(layout=replace(case.layout, residual=0), rule=replace(case.rule, decay=1.0))
    new, layer, groups = random_tokens(case, steps), Layer(case), case.layout.kv_heads
    heads = {(row, g): H2O(case.rule.proximity, case.rule.context) for row in range(case.batch) for g in range(groups)}
    for t in range(steps):
        out = layer.decode(part(new, t, t + 1))
        for (row, g), head in list(heads.items()):
            query = new.query[row].chunk(groups)[g]
            expected = head.step(query, new.key[row, g], new.value[row, g], t, case.rule.scale)
            close(out[row].chunk(groups)[g][:, 0], expected)
            if head.gap < DECISION:
                del heads[row, g]
            else:
                assert layer.live(row, g) == set(head.total)


# --- chunks


@few
@given(case=cases(), steps=st.integers(1, 30))
def test_chunks_of_one_are_decode_steps(case: Case, steps: int) -> None:
    """State for state, each from the same state: a tie broken by rounding must not spread."""
    new, one, other = random_tokens(case, steps), Layer(case), Layer(case)
    for t in range(steps):
        other.state = copy(one.state)
        active = torch.rand(case.batch, generator=torch.Generator().manual_seed(case.seed + t)) < 0.8
        mine = part(new, t, t + 1)
        out = one.decode(mine, active)
        close(other.extend(mine, pads=[int(not on) for on in active])[active], out[active])
        assert_same_states(one.state, other.state)
        assert torch.equal(one.seen, other.seen)


@few
@given(case=cases(), n=st.integers(1, 30), room=st.integers(0, 10))
def test_one_chunk_as_large_as_the_prompt_is_full(case: Case, n: int, room: int) -> None:
    """`room` columns of padding fill the chunk up; a row that holds tokens sends the call down the general path."""
    new, full = random_tokens(case, n), Layer(case)
    out = full.extend(new)
    padded = Tokens(*(torch.nn.functional.pad(tensor, (0, 0, room, 0)) for tensor in new))
    larger = case._replace(batch=case.batch + 1)
    chunked = Layer(larger)
    other = random_tokens(larger._replace(seed=case.seed + 1), n + room)
    chunked.decode(part(other, 0, 1), torch.arange(larger.batch) == case.batch)
    together = Tokens(*(torch.cat([ours, theirs[-1:]]) for ours, theirs in zip(padded, other, strict=True)))
    found = chunked.extend(together, pads=[room] * case.batch + [0])
    close(found[: case.batch, :, room:], out)
    assert_same_states(type(full.state)(*(tensor[: case.batch] for tensor in chunked.state)), full.state)


# --- windows


@few
@given(case=cases(windows=False).map(unrounded), data=st.data(), first=st.integers(0, 40), steps=st.integers(1, 30))
def test_a_budget_of_at_least_the_window_is_windowed_attention(
    case: Case, data: st.DataObject, first: int, steps: int
) -> None:
    window = data.draw(st.integers(1, case.layout.budget))
    case = case._replace(rule=replace(case.rule, window=window))
    new, layer = random_tokens(case, first + steps), Layer(case)
    expected, _ = full_attention(new, case.rule)
    close(layer.feed(new, first), expected)
    assert (layer.state.weight <= 1).all(), "nothing was merged"


# --- ties


def ties(case: Case, n: int) -> Tokens:
    """Attention is uniform, and every key and value the same: at decay 0 every choice is a tie."""
    new = random_tokens(case, n)
    return Tokens(new.query * 0, torch.ones_like(new.key), torch.ones_like(new.value))


@few
@given(case=cases(alibi=False, decays=(0.0,)), first=st.integers(0, 30), steps=st.integers(0, 30))
def test_of_equals_the_oldest_leaves_and_the_slot_opened_first_takes_it(case: Case, first: int, steps: int) -> None:
    """As the oracle's lists have it, to the token: no tie may depend on where a slot lies."""
    assume(first + steps)
    new, layer = ties(case, first + steps), Layer(case)
    layer.feed(new, first)
    rule, layout = case.rule, case.layout
    head = Head((rule.proximity, rule.context, layout.residual), rule.alpha, 0.0, rule.merge, rule.window)
    for start, stop in [(0, first)] * (first > 0) + [(t, t + 1) for t in range(first, first + steps)]:
        mine = part(new, start, stop)
        head.extend(mine.query[0, :1], mine.key[0, 0], mine.value[0, 0], range(start, stop), rule.scale)
    newest = [entry.newest for entry in head.context + head.ring]
    opened = [(entry.newest, float(entry.weight)) for entry in head.residual]
    for row in range(case.batch):
        for g in range(layout.kv_heads):
            assert [slot.newest for slot in singles(layer.state, row, g)] == newest
            assert [(slot.newest, slot.weight) for slot in residuals(layer.state, row, g)] == opened


@few
@given(case=plain, n=st.integers(1, 60))
def test_without_a_window_equals_leave_in_order(case: Case, n: int) -> None:
    """The same without an oracle: the newest stay single, and the first residual slot takes all but one per slot."""
    case = case._replace(rule=replace(case.rule, decay=0.0))
    layer, layout = Layer(case), case.layout
    layer.feed(ties(case, n))
    kept = list(range(max(0, n - layout.proximity - layout.context), n))
    left, size = kept[0], layout.residual
    for row in range(case.batch):
        for g in range(layout.kv_heads):
            assert [slot.newest for slot in singles(layer.state, row, g)] == kept
            weights = [slot.weight for slot in residuals(layer.state, row, g)]
            assert weights == ([max(1, left - size + 1)] + [1] * (min(left, size) - 1) if left and size else [])


@pytest.mark.parametrize("merge", ["segment", "sequential", "decode"])
def test_opened_first_is_not_the_first_slot(merge: str) -> None:
    """Token 0 expires out of residual slot 0 and token 3 opens it anew: a tie still goes to slot 1, opened before."""
    one, other = torch.eye(2)
    keys = torch.stack([one, other, other, one, one + other, one])[None, None]
    rule = Rule(1, 0, 0.6, 0.98, 1.0, window=5, merge="segment" if merge == "decode" else merge)
    layer = Layer(Case(LayerLayout(1, 1, 2, 1, 0, 2, window=5), rule, batch=1, seed=0))
    for t in range(6):
        token = part(Tokens(torch.zeros_like(keys), keys, keys), t, t + 1)
        layer.decode(token) if merge == "decode" else layer.extend(token)
    assert [(slot.newest, slot.weight) for slot in residuals(layer.state, 0, 0)] == [(4, 3.0), (3, 1.0)]


@few
@given(case=cases(), first=st.integers(1, 40))
def test_the_merge_rule_decides_nothing_but_the_residual(case: Case, first: int) -> None:
    """After one prompt, ring and context are the same under both rules, and so is what the residual weighs."""
    new = random_tokens(case, first)
    both = [Layer(case._replace(rule=replace(case.rule, merge=merge))) for merge in ("segment", "sequential")]
    close(both[0].extend(new), both[1].extend(new))
    for row in range(case.batch):
        for g in range(case.layout.kv_heads):
            assert_same_slots(singles(both[0].state, row, g), singles(both[1].state, row, g))
    at = case.layout.slots - case.layout.residual
    assert torch.equal(*(layer.state.weight[..., at:].sum(-1) for layer in both))
