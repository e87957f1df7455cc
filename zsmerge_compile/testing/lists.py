"""Between the slots of a compiled model's cache and the oracle's lists."""

from __future__ import annotations

import math
from typing import Any

from zsmerge_compile.testing.oracle import Entry, Oracle


def load_state(oracle: Oracle, compiled: Any) -> None:
    """Fill the oracle's lists from the cache; what its heads decided so far is forgotten."""
    oracle.seen = compiled.cache.seen_tokens.tolist()
    for index, layer in enumerate(oracle.heads):
        for row, heads in enumerate(layer):
            for g, head in enumerate(heads):
                head.ring, head.context, head.residual = _parts(compiled, index, row, g)
                head.margin = math.inf


def differing_heads(oracle: Oracle, compiled: Any, margin: float) -> str:
    """Heads that hold other tokens than the oracle's although no decision was closer than `margin`; "" if none."""
    wrong = []
    for index, layer in enumerate(oracle.heads):
        for row, heads in enumerate(layer):
            for g, head in enumerate(heads):
                if head.margin > margin and _held(*_parts(compiled, index, row, g)) != _held(
                    head.ring, head.context, head.residual
                ):
                    wrong.append(f"layer {index}, row {row}, key/value head {g}")
    return "; ".join(wrong)


def _held(ring: list[Entry], context: list[Entry], residual: list[Entry]) -> list[list[tuple[int, int]]]:
    return [[(entry.newest, entry.weight) for entry in part] for part in (ring, context, residual)]


def _parts(compiled: Any, index: int, row: int, g: int) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Ring and context by position, residual by opening. Slots lie as `ops/state.py` says."""
    layer, layout = compiled.cache.layers[index], compiled.program.layouts[index]
    weight, newest = layer.weight[row, g].tolist(), layer.position[row, g].tolist()
    score, opened = layer.score[row, g].tolist(), layer.opened[row, g].tolist()
    ring, singles = layout.proximity + 1, layout.proximity + 1 + layout.context

    def single(slot: int) -> Entry:
        key, value = layer.key[row, g, slot].float().cpu(), layer.value[row, g, slot].float().cpu()
        return Entry(key, value, newest[slot], float(newest[slot]), int(weight[slot]), score[slot])

    def merged(at: int) -> Entry:
        key, value = layer.residual_key[row, g, at].cpu().clone(), layer.residual_value[row, g, at].cpu().clone()
        mean = float(layer.residual_position[row, g, at])
        return Entry(key, value, newest[singles + at], mean, int(weight[singles + at]), score[singles + at])

    def live(first: int, stop: int) -> list[Entry]:
        found = [single(slot) for slot in range(first, stop) if weight[slot] > 0]
        return sorted(found, key=lambda entry: entry.newest)

    order = sorted(range(len(opened)), key=opened.__getitem__)
    return live(0, ring), live(ring, singles), [merged(at) for at in order if weight[singles + at] > 0]
