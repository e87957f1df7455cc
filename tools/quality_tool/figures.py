"""From answers to figures: means with 95% bootstrap intervals over texts and over recall prompts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quality_tool.answers import Answers
from quality_tool.material import Material

DEPTHS = 6  # equal parts of the context, for recall by depth
_DRAWS = 2_000
Floats = NDArray[np.float64]


class Figure(NamedTuple):
    """A mean over independent units, and the middle 95% of its bootstrap draws."""

    mean: float
    low: float
    high: float


def figure(units: Floats) -> Figure:
    """units [n], one number each."""
    chosen = np.random.default_rng(0).integers(0, len(units), (_DRAWS, len(units)))
    low, high = np.quantile(units[chosen].mean(1), [0.025, 0.975])
    return Figure(*(round(float(value), 4) for value in (units.mean(), low, high)))


def figures(answers: Answers, full: Answers, base: Answers | None, material: Material) -> dict[str, Any]:
    """What the table shows, as JSON can hold it; `full` are the full cache's answers, `base` those of the base
    method (the default, or what the ablations change) at the same budget.

    loss: nats per token; loss_added, loss_over_base: over the full cache's and the base's, text by text; recall,
    agreement, rouge_l: shares.
    """
    losses = np.array(answers.losses)
    pairs = list(zip(answers.greedy, full.greedy, strict=True))
    right = np.array(answers.right, dtype=float)
    return {
        "loss": figure(losses)._asdict(),
        "loss_added": figure(losses - np.array(full.losses))._asdict(),
        "loss_over_base": figure(losses - np.array(base.losses))._asdict() if base else None,
        "recall": figure(right.mean(1))._asdict(),
        "recall_by_depth": by_depth(right, material),
        "agreement": figure(np.array([np.mean(np.array(a) == np.array(b)) for a, b in pairs]))._asdict(),
        "rouge_l": figure(np.array([rouge_l(a, b) for a, b in pairs]))._asdict(),
        "seconds": answers.seconds,
    }


def by_depth(right: Floats, material: Material) -> list[float | None]:
    """Recall of the facts planted in each of DEPTHS equal parts of the context, from its beginning; None: no fact."""
    depths = np.array([[question.depth for question in recall.questions] for recall in material.recalls])
    part = np.minimum((depths * DEPTHS).astype(int), DEPTHS - 1)
    return [round(float(right[part == i].mean()), 4) if (part == i).any() else None for i in range(DEPTHS)]


def rouge_l(written: list[int], reference: list[int]) -> float:
    """F1 of the longest common subsequence of tokens (Lin 2004, ROUGE-L with beta = 1)."""
    row = np.zeros(len(reference) + 1, dtype=int)
    ids = np.array(reference)
    for token in written:
        grown = np.where(ids == token, row[:-1] + 1, row[1:])
        row[1:] = np.maximum.accumulate(grown)
    common = int(row[-1])
    return 2 * common / (len(written) + len(reference))
