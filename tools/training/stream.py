"""Tokenised source files as one long sequence that windows are cut from."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from training.corpus import SourceFile
from training.tokenizer import END

IntArray = NDArray[np.int64]


class Window(NamedTuple):
    ids: IntArray  # [n] tokens
    line_starts: IntArray  # positions in ids whose token starts with a newline, ascending


class Stream:
    """All files' tokens, each file closed by END."""

    def __init__(self, files: list[SourceFile], tokenizer: PreTrainedTokenizerFast) -> None:
        encoded = tokenizer([file.text + END for file in files], verbose=False)["input_ids"]
        self.ids: IntArray = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
        self.bytes = sum(len(file.text.encode()) for file in files)
        starts = [str(tokenizer.decode([token])).startswith("\n") for token in range(len(tokenizer))]
        self._line_starts: IntArray = np.flatnonzero(np.asarray(starts)[self.ids])

    def window(self, rng: np.random.Generator, length: int) -> Window:
        """`length` consecutive tokens from a random place that holds at least one line start."""
        while True:
            begin = int(rng.integers(0, len(self.ids) - length + 1))
            low, high = np.searchsorted(self._line_starts, [begin, begin + length])
            if low < high:
                return Window(self.ids[begin : begin + length], self._line_starts[low:high] - begin)
