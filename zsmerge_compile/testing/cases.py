"""What a random case is, and the calls it stands for. Only `cases` needs hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

FULL, SMALL = "full budget", "small budget"


@dataclass(frozen=True)
class Sizes:
    """Upper bounds of a case, in tokens, and the batch sizes compiled for."""

    prompt: int
    again: int
    steps: int
    batches: tuple[int, ...]

    @property
    def total(self) -> int:
        """Tokens a row may see."""
        return self.prompt + self.again + self.steps


@dataclass(frozen=True)
class Case:
    """A prompt, perhaps a second one, and steps; every token comes from `seed`.

    lengths  real tokens of each row's first prompt, padded on the left to the longest
    again    columns of a second prompt, 0: none
    steps    decode steps
    chunk    columns per chunk of a prompt; None: prefill="full"
    pauses   rows skip about a fifth of the steps (small budget only)
    """

    check: str
    lengths: tuple[int, ...]
    again: int
    steps: int
    chunk: int | None
    merge: Literal["segment", "sequential"]
    pauses: bool
    seed: int

    @property
    def batch(self) -> int:
        return len(self.lengths)


class Call(NamedTuple):
    """One call of a CompiledModel: `mask` is the attention_mask of a prefill, or the `active` of a decode."""

    kind: Literal["prefill", "decode"]
    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T] int64, or [B] bool


def cases(check: str, sizes: Sizes) -> SearchStrategy[Case]:
    """Random cases; the simplest is one row with one token. What decides the code that runs is drawn first."""
    from hypothesis import strategies as st

    merges = ("segment",) if check == FULL else ("segment", "sequential")  # at full budget nothing is merged
    kinds = list(product(sorted(sizes.batches), (True, False), merges))

    def upto(least: int, most: int) -> Any:
        """Left alone, hypothesis likes small numbers; a cache shows what it does when it is full."""
        return st.integers(least, most) | st.integers((least + most) // 2, most)

    def of_kind(kind: tuple[int, bool, str]) -> Any:
        batch, whole, merge = kind
        return st.builds(
            Case,
            check=st.just(check),
            lengths=st.tuples(*[upto(1, sizes.prompt)] * batch),
            again=upto(0, sizes.again),
            steps=upto(0, sizes.steps),
            chunk=st.none() if whole else st.integers(4, 32),
            merge=st.just(merge),
            pauses=st.just(False) if check == FULL else st.booleans(),
            seed=st.integers(0, 2**16),
        )

    return st.sampled_from(kinds).flatmap(of_kind)


def prompts_of(case: Case, vocab_size: int) -> list[Call]:
    """The prefill calls of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    columns = max(case.lengths)
    mask = (torch.arange(columns) >= columns - torch.tensor(case.lengths)[:, None]).long()
    ids = torch.randint(vocab_size, (case.batch, columns), generator=generator) * mask
    calls = [Call("prefill", ids, mask)]
    if case.again:
        more = torch.randint(vocab_size, (case.batch, case.again), generator=generator)
        calls.append(Call("prefill", more, torch.ones_like(more)))
    return calls


def steps_of(case: Case, vocab_size: int) -> list[Call]:
    """The decode calls of a case, with random tokens."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    ids = torch.randint(vocab_size, (case.steps, case.batch, 1), generator=generator)
    awake = torch.rand(case.steps, case.batch, generator=generator) < (0.8 if case.pauses else 2.0)
    return [Call("decode", ids[step], awake[step]) for step in range(case.steps)]


def columns_of(calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    """Everything that was fed as one left-padded prompt: ids and mask [B, T]. Tokens of inactive rows are skipped."""
    rows = []
    for row in range(len(calls[0].ids)):
        pieces = [call.ids[row][call.mask[row].bool().expand(call.ids.shape[1])] for call in calls]
        rows.append(torch.cat(pieces))
    columns = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (columns - len(row), 0)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(columns) >= columns - lengths[:, None]).long()
