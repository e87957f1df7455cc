"""The baseline the model has to beat: a token trigram with Witten-Bell interpolation.

p(z | h) = (count(h z) + types(h) * p(z | shorter h)) / (count(h) + types(h)), where types(h) is how many different
tokens followed h in training; the unigram is add-0.1 smoothed.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.stream import IntArray

FloatArray = NDArray[np.float64]


class _Table(NamedTuple):
    """Counts of n-grams and of their histories, an n-gram being one number: history * vocabulary + token."""

    grams: IntArray
    counts: IntArray
    histories: IntArray
    totals: IntArray
    types: IntArray


def trigram_bits(train: IntArray, held_out: IntArray, vocab_size: int) -> float:
    """Bits the trigram needs for held_out[2:], given the two tokens before each."""
    unigram = np.bincount(train, minlength=vocab_size) + 0.1
    x, y, z = held_out[:-2], held_out[1:-1], held_out[2:]
    p = (unigram / unigram.sum())[z]
    p = _interpolate(_count(train[:-1], train[1:], vocab_size), y, z, vocab_size, p)
    pairs = train[:-2] * vocab_size + train[1:-1]
    p = _interpolate(_count(pairs, train[2:], vocab_size), x * vocab_size + y, z, vocab_size, p)
    return float(-np.log2(p).sum())


def _count(history: IntArray, token: IntArray, vocab_size: int) -> _Table:
    grams, counts = np.unique(history * vocab_size + token, return_counts=True)
    histories, index = np.unique(grams // vocab_size, return_inverse=True)
    totals = np.bincount(index, weights=counts).astype(np.int64)
    return _Table(grams, counts, histories, totals, np.bincount(index))


def _interpolate(table: _Table, history: IntArray, token: IntArray, vocab_size: int, shorter: FloatArray) -> FloatArray:
    seen = _look_up(table.grams, table.counts, history * vocab_size + token)
    total = _look_up(table.histories, table.totals, history)
    types = _look_up(table.histories, table.types, history)
    return np.where(total > 0, (seen + types * shorter) / np.maximum(total + types, 1), shorter)


def _look_up(names: IntArray, values: IntArray, wanted: IntArray) -> IntArray:
    """values[i] where names[i] == wanted, 0 where there is none; names ascend."""
    index = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
    return np.where(names[index] == wanted, values[index], 0)
