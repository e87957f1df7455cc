"""Intervals, overlap and depth: the arithmetic between answers and the table."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quality_tool.answers import Answers
from quality_tool.figures import DEPTHS, figure, figures, rouge_l
from quality_tool.material import Material, Question, Recall, Text

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12)


def common(a: list[int], b: list[int]) -> int:
    """The longest common subsequence by its definition."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return common(a[:-1], b[:-1]) + 1
    return max(common(a[:-1], b), common(a, b[:-1]))


@given(
    written=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    reference=st.lists(st.integers(0, 3), min_size=1, max_size=7),
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(written: list[int], reference: list[int]) -> None:
    n = common(written, reference)
    precision, recall = n / len(written), n / len(reference)
    expected = 2 * precision * recall / (precision + recall) if n else 0.0
    assert math.isclose(rouge_l(written, reference), expected)


@given(a=TOKENS, b=TOKENS)
def test_rouge_l_is_symmetric_and_1_for_itself(a: list[int], b: list[int]) -> None:
    assert rouge_l(a, a) == 1 and math.isclose(rouge_l(a, b), rouge_l(b, a))


def test_intervals_hold_the_mean_and_shrink_with_more_units() -> None:
    rng = np.random.default_rng(1)
    few, many = figure(rng.normal(3, 1, 20)), figure(rng.normal(3, 1, 2_000))
    for found in (few, many):
        assert found.low < found.mean < found.high
    assert many.low < 3 < many.high and many.high - many.low < (few.high - few.low) / 4
    assert figure(np.ones(5)) == (1.0, 1.0, 1.0)


def test_figures_of_a_method_beside_the_full_cache() -> None:
    questions = [Question([1], [2, 3], depth) for depth in (0.0, 0.4, 1.0)]
    material = Material([Text([1], [2, 3])] * 2, [Recall([1], questions)] * 2)
    full = Answers([1.0, 2.0], [[5, 6], [7, 8]], [[True] * 3] * 2, 1.0)
    ours = Answers([1.5, 2.5], [[5, 9], [7, 8]], [[False, True, True], [False, False, True]], 1.0)
    base = Answers([1.0, 3.0], ours.greedy, ours.right, 1.0)
    told = figures(ours, full, base, material)
    assert told["loss_over_base"]["mean"] == 0.0 and figures(ours, full, None, material)["loss_over_base"] is None
    assert told["loss"]["mean"] == 2.0 and told["loss_added"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert told["recall"]["mean"] == 0.5 and told["agreement"]["mean"] == 0.75 and told["rouge_l"]["mean"] == 0.75
    depths = told["recall_by_depth"]
    assert depths[0] == 0 and depths[2] == 0.5 and depths[DEPTHS - 1] == 1
    assert all(depths[part] is None for part in (1, 3, 4)), "JSON has no NaN"
