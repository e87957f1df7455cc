"""The paper's Table 1: prompt + generated tokens, from step times sampled at several lengths and integrated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from zsmerge_compile.bench.records import MEASURED, Record

SAMPLES = 5  # lengths at which a step is timed


class Workload(NamedTuple):
    """One row of the paper's table, with its figures for a full cache and for ZSMerge at 5%: tokens per second."""

    model: str
    prompt: int
    new: int
    batch: int
    paper_full: float | None  # None: out of memory
    paper_zsmerge: float

    @property
    def name(self) -> str:
        return f"{self.prompt}+{self.new}"

    def lengths(self) -> tuple[int, ...]:
        """Where steps are timed: both ends, and evenly between them."""
        return tuple(self.prompt + self.new * i // (SAMPLES - 1) for i in range(SAMPLES))


PAPER = (
    Workload("llama-2-7b", 4096, 4096, 4, 62.4, 77.0),
    Workload("llama-2-7b", 4096, 4096, 8, 65.5, 146.7),
    Workload("llama-2-7b", 2048, 2048, 16, 133.1, 281.9),
    Workload("llama-2-13b", 4096, 4096, 16, None, 178.2),
)


class Total(NamedTuple):
    """What one method would take for a workload: seconds of its prefill and of all steps, tokens per second."""

    place: tuple[object, ...]
    method: str
    where: str
    label: str
    prefill_s: float
    decode_s: float
    samples: int
    check: str | None
    runs: tuple[int, ...] = ()

    @property
    def latency_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of all rows over the latency, as in the paper."""
        batch, new = self.place[-2:]
        assert isinstance(batch, int) and isinstance(new, int)
        return batch * new / self.latency_s


def integral(lengths: Sequence[int], ms: Sequence[float]) -> float:
    """Seconds of one step at every length from the first to the last but one, `ms` interpolated between the samples.

    The trapezoid rule: exact where a step's time grows linearly, as a full cache's does.
    """
    area = 0.0
    samples = list(zip(lengths, ms, strict=True))
    for (start, low), (stop, high) in pairwise(samples):
        # steps start, start + 1, ..., stop - 1: the mean of the first and the last of them, times their number
        last = high - (high - low) / (stop - start)
        area += (low + last) / 2 * (stop - start)
    return area / 1e3


def totals(records: Iterable[Record], machines: Mapping[int, object] | None = None) -> list[Total]:
    """One per workload, method and machine whose steps at all lengths, and whose prefill, were measured.

    machines: of each run, by its number; without, all runs count as one machine's.
    """
    machines = machines or {}
    groups: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    for record in records:
        if record.suite == "table1" and record.status == MEASURED:
            where = machines.get(record.run or 0)
            place = (where, record.model, record.layers, record.dtype, record.device, record.note, record.batch)
            groups[place].append(record)
    return [total for place, rows in groups.items() for total in _of_workload(place, rows)]


def _of_workload(place: tuple[object, ...], rows: list[Record]) -> Iterator[Total]:
    """The methods of which everything is there."""
    prompt, new = (int(part) for part in rows[0].note.split("+"))
    lengths = Workload(rows[0].model, prompt, new, 0, None, 0).lengths()
    for method, first in (("dynamic", "prompt"), ("static", "prompt"), ("zsmerge", "prompt-full")):
        steps = sorted((r for r in rows if r.method == method), key=lambda r: r.context)
        prefill = next((r for r in rows if r.method == first), None)
        wanted = lengths[-1:] if method == "static" else lengths  # a static cache is as long from the start
        if prefill is None or tuple(r.context for r in steps) != wanted:
            continue
        times = [r.ms or 0.0 for r in steps]
        used = (*steps, prefill)
        yield Total(
            (*place, new),
            method,
            f"{rows[0].model}, {prompt} + {new} tokens, batch {rows[0].batch}",
            steps[0].label,
            prefill_s=(prefill.ms or 0.0) * prompt / 1e3,
            decode_s=new * times[0] / 1e3 if method == "static" else integral(lengths, times),
            samples=len(steps),
            check="red" if any(r.check == "red" for r in used) else steps[0].check,
            runs=tuple(sorted({r.run for r in used if r.run is not None})),
        )
