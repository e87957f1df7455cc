"""`check_equivalence`: random cases against what a compiled model must equal, the failing ones made small."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from zsmerge_compile.errors import EquivalenceError, InputError, MissingBackendError, must
from zsmerge_compile.testing.cases import FULL, SMALL, Case, Sizes, cases
from zsmerge_compile.testing.compare import Mismatch, Tally, compare
from zsmerge_compile.testing.locate import where_parts
from zsmerge_compile.testing.report import CheckResult, EquivalenceReport
from zsmerge_compile.testing.snippet import snippet
from zsmerge_compile.testing.subject import MakePolicy, Subject

Progress = Callable[[str, int, int], None]  # (check, cases done, cases at most)

SHRINK_SECONDS = 60.0  # for making a failing case smaller
AGAINST = {FULL: "the untouched model", SMALL: "ZSMerge on lists of tokens"}


def check_equivalence(
    model: nn.Module,
    *,
    backend: str = "eager",
    max_examples: int = 40,
    seed: int = 0,
    budget_small: int = 24,
    steps: int = 24,
    max_length: int | None = None,
    batch_sizes: Sequence[int] = (1, 3),
    kv_heads: int | None = None,
    policy: MakePolicy | None = None,
    progress: Progress | None = None,
) -> EquivalenceReport:
    """Compare the compiled model with the untouched one at full budget, and past it with ZSMerge on lists of tokens.

    Cases are random: batches, prompt lengths with left padding, whole and chunked prompts, a second prompt, merge
    rules, rows that pause. Logits must agree within `testing/tolerance.py`; in fp32 so must greedy tokens. Tokens are
    random ids, so no tokenizer is needed, and the model is neither changed nor copied (in bf16 and fp16 a model that
    is not from transformers, or has ALiBi, is copied to fp32, to learn how far rounding alone takes it).

    max_examples  cases of each of the two checks
    seed          of the cases; equal seeds give equal cases
    budget_small  slots of the second check
    steps         tokens decoded after the prompt, at most
    max_length    tokens of a prompt, at most; twice budget_small by default. A sliding window longer than a case is
                  not exercised: raise it for that
    batch_sizes   each is compiled once at full budget, and once per merge rule at the small one
    kv_heads      key/value heads that the cache must hold, for a class that is not from transformers; what the passes
                  found by default
    policy        another cache than ZSMerge's, of so many slots: lambda budget: zs.policy("h2o", budget=budget). Only
                  the first check is made of it, at a budget with room for all tokens in every layer
    progress      called with (check, cases done, cases at most) after every case

    Raises EquivalenceError with the smallest failing case, as code, and the layer where the two part; what `compile`
    raises; MissingBackendError without hypothesis.
    """
    _need_hypothesis()
    started = time.perf_counter()
    sizes = _sizes(steps, max_length or 2 * budget_small, batch_sizes)
    subject = Subject(model, backend, sizes, budget_small, kv_heads, policy)
    _check_positions(subject.spec.max_positions, sizes)
    results, skipped = [], []
    for check in (FULL, SMALL):
        simplest = Case(check, (1,) * sizes.batches[0], 0, 0, None, "segment", False, 0)
        if check == SMALL and (why := subject.why_no_oracle(simplest)):
            skipped.append(f"{check}: {why}")
            continue
        tally = _search(subject, check, max_examples, seed, progress)
        results.append(CheckResult(check, AGAINST[check], **vars(tally)))
    seconds = time.perf_counter() - started
    dtype = str(subject.dtype).removeprefix("torch.")
    return EquivalenceReport(type(model).__name__, dtype, backend, tuple(results), tuple(skipped), seconds)


def _search(subject: Subject, check: str, max_examples: int, seed: int, progress: Progress | None) -> Tally:
    """Run random cases; the smallest that fails becomes an EquivalenceError."""
    tally, failing, first = Tally(), dict[Case, Mismatch](), list[float]()

    def attempt(case: Case) -> None:
        if case in failing:
            raise failing[case]
        if first and time.perf_counter() - first[0] > SHRINK_SECONDS:
            return  # small enough
        try:
            compare(subject, case, tally)
        except Mismatch as mismatch:
            failing[case] = mismatch
            first.append(time.perf_counter())
            raise
        if progress is not None and not first:
            progress(check, tally.cases, max_examples)

    try:
        _hypothesis_runs(attempt, cases(check, subject.sizes), max_examples, seed)
    except Mismatch as mismatch:
        raise EquivalenceError(_message(subject, mismatch)) from mismatch.__cause__
    return tally


def _hypothesis_runs(attempt: Callable[[Case], None], strategy: Any, max_examples: int, seed: int) -> None:
    import hypothesis

    chosen = hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    with _no_folder_left_behind():
        hypothesis.seed(seed)(chosen(hypothesis.given(strategy)(attempt)))()


@contextmanager
def _no_folder_left_behind() -> Iterator[None]:
    """Without an example database hypothesis would still write a `.hypothesis` where the user happens to be."""
    from hypothesis import configuration

    given = getattr(configuration, "__hypothesis_home_directory", None)
    with tempfile.TemporaryDirectory() as folder:
        configuration.set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(given)


def _message(subject: Subject, mismatch: Mismatch) -> str:
    case, call = mismatch.case, mismatch.calls[-1]
    against = f"{type(subject.model).__name__} compiled ({case.check}) and {AGAINST[case.check]} differ"
    return (
        f"{against}: {mismatch.what} (call {len(mismatch.calls)}, {call.kind}).\n"
        f"{where_parts(subject, mismatch)}\n"
        f"The smallest failing case found:\n\n{snippet(subject, mismatch)}"
    )


def _sizes(steps: int, max_length: int, batch_sizes: Sequence[int]) -> Sizes:
    for name, number in (("steps", steps), ("max_length", max_length), *(("batch size", b) for b in batch_sizes)):
        if number < 1:
            raise InputError(must(name, "at least 1", number))
    if not batch_sizes:
        raise InputError(must("batch_sizes", "at least one batch size", "none"))
    return Sizes(max_length, min(8, max_length), steps, tuple(batch_sizes))


def _check_positions(limit: int | None, sizes: Sizes) -> None:
    if limit is not None and sizes.total > limit:
        what = "max_length + steps + a second prompt"
        raise InputError(must(what, f"at most {limit}, the model's positions", sizes.total))


def _need_hypothesis() -> None:
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        expected = "installed (pip install zsmerge-compile[test])"
        raise MissingBackendError(must("hypothesis", expected, "no such module")) from error
