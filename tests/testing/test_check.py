"""`check_equivalence` passes on sound models, and fails on every fault put in, naming where it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zsmerge_compile as zs
from tests.models_zoo import tiny
from zsmerge_compile.errors import InputError, MissingBackendError, UnsupportedModelError
from zsmerge_compile.lower import eager
from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.ops import fold, reference
from zsmerge_compile.passes import pipeline
from zsmerge_compile.policies.zsmerge import ZSMergePolicy
from zsmerge_compile.testing import EquivalenceError, check, check_equivalence
from zsmerge_compile.testing.cases import FULL, SMALL, Case, Sizes, cases
from zsmerge_compile.testing.tolerance import LOGITS_FP32

QUICK: dict[str, Any] = dict(max_examples=6, batch_sizes=(2,), budget_small=12, steps=10)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama-gqa", torch.float32),
        ("falcon-new", torch.float32),
        ("falcon-rw", torch.bfloat16),
        ("mistral-w8", torch.float16),
    ],
)
def test_sound_models_pass(name: str, dtype: torch.dtype) -> None:
    seen: list[tuple[str, int, int]] = []
    report = check_equivalence(tiny(name, dtype), **QUICK, progress=lambda *step: seen.append(step))
    assert [result.name for result in report.checks] == [FULL, SMALL] and report.skipped == ()
    assert seen == [(name, done, 6) for name in (FULL, SMALL) for done in range(1, 7)]
    for result in report.checks:
        assert result.cases == 6 and result.logits > 30 and 0 < result.used <= 1
    if dtype is torch.float32:
        assert report.checks[0].tokens > 30 and max(result.worst for result in report.checks) < LOGITS_FP32
    assert "no difference found" in str(report) and FULL in str(report) and SMALL in str(report)


def test_cases_differ_in_what_matters_and_most_outgrow_the_budget() -> None:
    found = drawn(SMALL, 40, seed=0)
    assert {(case.batch, case.merge) for case in found} == set(product((1, 3), ("segment", "sequential")))
    assert {case.chunk is None for case in found} == {case.pauses for case in found} == {True, False}
    assert sum(max(case.lengths) + case.steps > 24 for case in found) > 25


def test_a_seed_fixes_the_cases() -> None:
    assert drawn(FULL, 10, seed=3) == drawn(FULL, 10, seed=3) != drawn(FULL, 10, seed=4)


def drawn(name: str, count: int, seed: int) -> list[Case]:
    found: list[Case] = []
    check._hypothesis_runs(lambda case: found.append(case), cases(name, Sizes(48, 8, 24, (1, 3))), count, seed)
    return found


# --- faults, put in between the given model and what runs

Patch = pytest.MonkeyPatch


def rule_of_layer_1(patch: Patch, field: str, new: Callable[[float], float], graphs: tuple[str, ...]) -> None:
    """Change one constant of layer 1's cache ops in some of the graphs."""
    sound, sound_pass, now = ZSMergePolicy.rule, pipeline.insert_cache, [""]

    def noting(*given: Any, decode: bool, **more: Any) -> int:
        now[0] = "decode" if decode else "prefill"
        return sound_pass(*given, decode=decode, **more)

    def faulty(self: Any, site: Any, layout: Any) -> Any:
        rule = sound(self, site, layout)
        touched = site.layer == 1 and now[0] in graphs
        return replace(rule, **{field: new(getattr(rule, field))}) if touched else rule

    patch.setattr(pipeline, "insert_cache", noting)
    patch.setattr(ZSMergePolicy, "rule", faulty)


def wrong_scale(patch: Patch) -> None:
    rule_of_layer_1(patch, "scale", lambda scale: 1.02 * scale, ("decode",))


def wrong_alpha(patch: Patch) -> None:
    rule_of_layer_1(patch, "alpha", lambda alpha: alpha - 0.1, ("decode",))


def wrong_window(patch: Patch) -> None:
    rule_of_layer_1(patch, "window", lambda window: window + 1, ("decode", "prefill"))


def no_bias(patch: Patch) -> None:
    """Merged slots count as one token, and nothing knows of ALiBi."""
    patch.setattr(reference, "slot_biases", lambda state, dtype, rule: torch.zeros(1, 1, 1, 1, 1))


def best_victim(patch: Patch) -> None:
    """The context keeps the worst of its candidates."""
    sound = fold.choose_context

    def faulty(tokens: Any, *rest: Any) -> Any:
        kept, victims = sound(tokens._replace(score=-tokens.score), *rest)
        return kept._replace(score=-kept.score), victims._replace(score=-victims.score)

    patch.setattr(fold, "choose_context", faulty)


def late_positions(patch: Patch) -> None:
    """Rotary angles of decoded tokens are those of the token before."""
    sound = eager.lower

    def faulty(program: Any) -> Any:
        for node in program.decode.graph.nodes:
            if node.target is torch.ops.aten.unsqueeze.default and node.args[0].target == "seen":
                with program.decode.graph.inserting_after(node):
                    late = program.decode.graph.call_function(torch.ops.aten.sub.Scalar, (node, 1))
                node.replace_all_uses_with(late, delete_user_cb=lambda user, late=late: user is not late)
        program.decode.recompile()
        return sound(program)

    patch.setattr(eager, "lower", faulty)


def wrong_code(patch: Patch) -> None:
    """The backend's code for the decode graph is not the graph."""
    sound = eager.lower

    def faulty(program: Any) -> Lowered:
        lowered = sound(program)

        def decode(*inputs: Tensor) -> Tensor:
            return 1.01 * lowered.decode(*inputs)

        return lowered._replace(decode=decode)

    patch.setattr(eager, "lower", faulty)


def crash(patch: Patch) -> None:
    def faulty(*_: Any) -> Any:
        raise IndexError("slot 13")

    patch.setattr(fold, "open_residual", faulty)


FAULTS = [
    (wrong_scale, "llama-gqa", torch.float32, FULL, "Attention outputs part first in layer 1 of 2"),
    (wrong_alpha, "falcon-new", torch.float32, SMALL, "Attention outputs part first in layer 1 of 2"),
    (wrong_window, "mistral-w8", torch.float32, FULL, "Attention outputs part first in layer 1 of 2"),
    (no_bias, "llama-gqa", torch.float32, SMALL, "Attention outputs part first in layer 0 of 2"),
    (no_bias, "falcon-rw", torch.float32, FULL, "Attention outputs part first in layer 0 of 2"),
    (best_victim, "falcon-7b", torch.float32, SMALL, "Attention outputs part first in layer 0 of 2"),
    (best_victim, "llama-gqa", torch.bfloat16, SMALL, "tokens kept must be the oracle's, got others in layer 0"),
    (late_positions, "llama-gqa", torch.float32, FULL, "Attention outputs part first in layer 0 of 2"),
    (wrong_code, "llama-gqa", torch.float32, FULL, "agree in every layer"),
    (crash, "llama-gqa", torch.float32, FULL, "got IndexError: slot 13"),
]


@pytest.mark.parametrize(
    ("fault", "name", "dtype", "where", "message"),
    [pytest.param(*given, id=f"{given[0].__name__}-{given[1]}-{given[2]}") for given in FAULTS],
)
def test_a_fault_is_found_and_placed(
    fault: Callable[[Patch], None],
    name: str,
    dtype: torch.dtype,
    where: str,
    message: str,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the code in the message shows it."""
    fault(monkeypatch)
    monkeypatch.setattr(check, "SHRINK_SECONDS", 4.0)
    model = tiny(name, dtype)
    with pytest.raises(EquivalenceError) as raised:
        check_equivalence(model, **QUICK)
    text = str(raised.value)
    assert f"({where})" in text.splitlines()[0] and message in text
    code = text.partition("The smallest failing case found:")[2]
    if fault is crash:
        with pytest.raises(IndexError, match="slot 13"):
            exec(code, {"model": model})
    else:
        exec(code, {"model": model})
        worst = capsys.readouterr().out.strip().splitlines()[-1]
        assert max(float(share) for share in re.findall(r"\d\.\d+(?:e[+-]\d+)?", worst)) > LOGITS_FP32


def test_the_smallest_case_is_small(monkeypatch: Patch) -> None:
    """A wrong first decode step needs one row, one token and one step."""
    late_positions(monkeypatch)
    with pytest.raises(EquivalenceError) as raised:
        check_equivalence(tiny("llama-gqa"), **{**QUICK, "batch_sizes": (1, 3)})
    calls = str(raised.value).partition("calls = [")[2].partition("\n]")[0]
    assert re.sub(r"\d+", "_", calls).split("\n")[1:] == ["    ([[_]], [[_]]),", "    ([[_]], [True]),"]


def test_an_oracle_that_does_not_know_the_model_is_said_so(monkeypatch: Patch) -> None:
    """Without a config that tells its slopes, ALiBi is checked at full budget only."""
    monkeypatch.setattr("zsmerge_compile.testing.noise.FAMILIES", ())
    report = check_equivalence(tiny("falcon-rw"), **QUICK)
    assert [result.name for result in report.checks] == [FULL]
    assert "ALiBi" in report.skipped[0] and "not checked: small budget" in str(report)


# --- what it refuses, and what it costs to import


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(max_length=-1), "max_length must be at least 1, got -1"),
        (dict(batch_sizes=()), "batch_sizes must be at least one batch size, got none"),
        (dict(batch_sizes=(1, 0)), "batch size must be at least 1, got 0"),
        (dict(max_length=8192), "must be at most 8192, the model's positions, got 8224"),
    ],
)
def test_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_equivalence(tiny("llama-gqa"), **wrong)


def test_refuses_what_compile_refuses() -> None:
    with pytest.raises(UnsupportedModelError):
        check_equivalence(tiny("llama-gqa").train())
    with pytest.raises(zs.ZSMergeError, match="budget must be"):
        check_equivalence(tiny("llama-gqa"), budget_small=2)


def test_without_hypothesis(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(MissingBackendError, match=re.escape("pip install zsmerge-compile[test]")):
        check_equivalence(tiny("llama-gqa"))


def test_it_leaves_no_folder_behind(tmp_path: Path) -> None:
    code = (
        "from zsmerge_compile.testing import check, cases\n"
        "sizes = cases.Sizes(48, 8, 24, (1, 3))\n"
        "check._hypothesis_runs(lambda case: None, cases.cases('full budget', sizes), 5, 0)\n"
    )
    path = os.pathsep.join([str(Path(zs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert list(tmp_path.iterdir()) == []


def test_importing_it_is_cheap() -> None:
    code = "import sys, zsmerge_compile.testing as t; print([m for m in ('torch', 'hypothesis') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
