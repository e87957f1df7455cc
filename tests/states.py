"""Comparing cache states that may lay their slots out differently."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zsmerge_compile.ops.state import State
from zsmerge_compile.testing.oracle import Entry, Head


class Slot(NamedTuple):
    """One live slot."""

    newest: int
    weight: float
    score: float
    key: Tensor
    value: Tensor
    mean: float


def singles(state: State, row: int, head: int) -> list[Slot]:
    """Live ring and context slots, oldest first."""
    count = state.weight.shape[2] - state.opened.shape[2]
    weight = state.weight[row, head]
    found = [
        Slot(
            int(state.position[row, head, i]),
            float(weight[i]),
            float(state.score[row, head, i]),
            state.key[row, head, i],
            state.value[row, head, i],
            float(state.position[row, head, i]),
        )
        for i in range(count)
        if weight[i] > 0
    ]
    return sorted(found, key=lambda slot: slot.newest)


def residuals(state: State, row: int, head: int) -> list[Slot]:
    """Live residual slots, by the order in which they were opened."""
    first = state.weight.shape[2] - state.opened.shape[2]
    order = sorted(range(state.opened.shape[2]), key=lambda i: int(state.opened[row, head, i]))
    return [
        Slot(
            int(state.position[row, head, first + i]),
            float(state.weight[row, head, first + i]),
            float(state.score[row, head, first + i]),
            state.residual_key[row, head, i],
            state.residual_value[row, head, i],
            float(state.residual_position[row, head, i]),
        )
        for i in order
        if state.weight[row, head, first + i] > 0
    ]


def slots_of(head: Head) -> tuple[list[Slot], list[Slot]]:
    """An oracle's head in the same form."""

    def slot(entry: Entry) -> Slot:
        return Slot(entry.newest, float(entry.weight), entry.score, entry.key, entry.value, entry.mean_position)

    return sorted(map(slot, head.ring + head.context), key=lambda s: s.newest), list(map(slot, head.residual))


def assert_same_slots(ours: list[Slot], theirs: list[Slot], tolerance: float = 1e-4) -> None:
    """Same tokens in the same order, numbers within tolerance."""
    assert [(s.newest, s.weight) for s in ours] == [(s.newest, s.weight) for s in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.key.float(), b.key.float(), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(a.value.float(), b.value.float(), atol=tolerance, rtol=tolerance)
        assert abs(a.score - b.score) <= tolerance * max(1.0, abs(b.score)), (a.score, b.score)
        assert abs(a.mean - b.mean) <= tolerance * max(1.0, b.mean), (a.mean, b.mean)


def assert_same_states(ours: State, theirs: State, tolerance: float = 1e-4) -> None:
    """Two states hold the same, slot for slot, whatever their layouts."""
    batch, groups = ours.weight.shape[:2]
    for row in range(batch):
        for head in range(groups):
            assert_same_slots(singles(ours, row, head), singles(theirs, row, head), tolerance)
            assert_same_slots(residuals(ours, row, head), residuals(theirs, row, head), tolerance)
