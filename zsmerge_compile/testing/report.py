"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckResult:
    """One check over all its cases.

    name     "full budget" or "small budget"
    against  what the compiled model was compared with
    cases    random cases run
    logits   rows of logits compared
    worst    largest difference of a row, as a share of that row's range
    used     largest difference of a row, as a share of what is allowed (at most 1)
    tokens   greedy tokens compared (fp32, full budget)
    ties     rows no longer compared because a decision was too close to call
    """

    name: str
    against: str
    cases: int
    logits: int
    worst: float
    used: float
    tokens: int = 0
    ties: int = 0

    def __str__(self) -> str:
        parts = [
            f"{self.name}: {self.cases} cases, {self.logits} rows of logits equal those of {self.against}",
            f"worst difference {self.worst:.1e} of their range, {self.used:.0%} of what is allowed",
        ]
        if self.tokens:
            parts.append(f"{self.tokens} greedy tokens the same")
        if self.ties:
            parts.append(f"{self.ties} rows left at a near tie")
        return "; ".join(parts)


@dataclass(frozen=True)
class EquivalenceReport:
    """What `check_equivalence` returns when it found no difference.

    skipped says which check was not made, and why; seconds include compilation.
    """

    model: str
    dtype: str
    backend: str
    checks: tuple[CheckResult, ...]
    skipped: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.model} in {self.dtype}, backend {self.backend}: no difference found in {self.seconds:.0f} s"]
        lines += [f"  {check}" for check in self.checks]
        lines += [f"  not checked: {reason}" for reason in self.skipped]
        return "\n".join(lines)
