"""Run one case through a compiled model and its reference, and judge the logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.testing.cases import FULL, Call, Case, columns_of, prompts_of, steps_of
from zsmerge_compile.testing.references import Reference
from zsmerge_compile.testing.subject import Subject
from zsmerge_compile.testing.tolerance import HALF_FACTOR, HALF_FLOOR, LOGITS_FP32


class Mismatch(Exception):
    """A case whose logits differ; `calls` end with the one after which they do."""

    def __init__(self, case: Case, calls: list[Call], what: str) -> None:
        super().__init__(what)
        self.case, self.calls, self.what = case, calls, what


@dataclass
class Tally:
    """What the cases of one check added up to."""

    cases: int = 0
    logits: int = 0
    worst: float = 0.0
    used: float = 0.0
    tokens: int = 0
    ties: int = 0


@dataclass
class Trace:
    """What both sides answered, call by call."""

    calls: list[Call] = field(default_factory=list)
    ours: list[Tensor] = field(default_factory=list)
    theirs: list[Tensor] = field(default_factory=list)
    rows: list[list[bool]] = field(default_factory=list)


def compare(subject: Subject, case: Case, tally: Tally) -> None:
    """Raises Mismatch if the case's logits differ by more than the tolerance, or the compiled model fails on it."""
    trace = follow(subject, case, subject.compiled(case), subject.reference(case))
    judge(subject, case, trace, tally)


def follow(subject: Subject, case: Case, compiled: Any, reference: Reference) -> Trace:
    """Make the case's calls on both sides. At full budget in fp32 each row is fed its own greedy token."""
    trace, vocab = Trace(), subject.spec.vocab_size
    greedy = case.check == FULL
    for call in [*prompts_of(case, vocab), *steps_of(case, vocab)]:
        ids = call.ids
        if call.kind == "decode" and greedy:
            ids = trace.theirs[-1].argmax(-1, keepdim=True)
        call = Call(call.kind, ids.to(subject.device), call.mask.to(subject.device))
        trace.calls.append(call)
        reference.before(compiled)
        answer = reference(call)
        trace.ours.append(_answer(compiled, case, trace.calls))
        trace.theirs.append(answer.logits)
        trace.rows.append(answer.rows)
        if wrong := reference.after(compiled):
            raise Mismatch(case, trace.calls, f"tokens kept must be the oracle's, got others in {wrong}")
    return trace


def _answer(compiled: Any, case: Case, calls: list[Call]) -> Tensor:
    kind, ids, mask = calls[-1]
    try:
        logits: Tensor = compiled.prefill(ids, mask) if kind == "prefill" else compiled.decode(ids, mask)
    except Exception as error:
        what = (str(error).splitlines() or [""])[0]
        raise Mismatch(case, calls, f"{kind} must answer, got {type(error).__name__}: {what}") from error
    return logits


def judge(subject: Subject, case: Case, trace: Trace, tally: Tally) -> None:
    """Compare every row of every call, in order; raises Mismatch at the first that differs."""
    noise = subject.noise(*columns_of(trace.calls)) if subject.half else None
    tally.cases += 1
    for index, (ours, theirs, rows) in enumerate(zip(trace.ours, trace.theirs, trace.rows, strict=True)):
        for row in range(case.batch):
            if rows[row]:
                one, other = ours[row].double(), theirs[row].double()
                error, allowed = float((one - other).abs().max()), allowance(theirs[row], noise)
                extent = float(other.max() - other.min())
                if not error <= allowed:
                    raise Mismatch(case, trace.calls[: index + 1], _too_far(error, allowed, extent, row))
                tally.worst = max(tally.worst, error / extent)
                tally.used = max(tally.used, error / allowed)
                tally.logits += 1
                _same_token(case, trace.calls[: index + 1], one, other, allowed, row, noise is None, tally)
    tally.ties += sum(not row for row in _left(trace))


def allowance(logits: Tensor, noise: float | None) -> float:
    """How far logits [vocab] may be from others; `noise` is None in fp32."""
    if noise is None:
        return LOGITS_FP32 * float(logits.max() - logits.min())
    unit = torch.finfo(logits.dtype).eps * float(logits.abs().max())
    return max(HALF_FACTOR * noise, HALF_FLOOR * unit)


def _too_far(error: float, allowed: float, extent: float, row: int) -> str:
    kind = f"{allowed / extent:.1e} of their range"
    return f"logits of row {row} must be within {kind}, got a difference of {error / extent:.1e}"


def _same_token(
    case: Case, calls: list[Call], one: Tensor, other: Tensor, allowed: float, row: int, fp32: bool, tally: Tally
) -> None:
    """In fp32 the most likely token is the same, unless a second one is as likely."""
    first, second = other.topk(2).values.tolist()
    if case.check != FULL or not fp32 or first - second <= 2 * allowed:
        return
    tally.tokens += 1
    if int(one.argmax()) != int(other.argmax()):
        what = f"greedy token of row {row} must be {int(other.argmax())}, got {int(one.argmax())}"
        raise Mismatch(case, calls, what)


def _left(trace: Trace) -> list[bool]:
    """Rows still compared at the last call that reached them."""
    still = [True] * len(trace.rows[0])
    for call, rows in zip(trace.calls, trace.rows, strict=True):
        for row, good in enumerate(rows):
            if call.kind == "prefill" or bool(call.mask[row]):
                still[row] = good
    return still
