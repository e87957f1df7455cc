"""Suite policies: a step of each on a cache it filled itself, checked, and held against plain attention."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import zsmerge_compile as zs
from tests.bench.test_figures import record, shown
from zsmerge_compile.bench import plan, presets, shapes
from zsmerge_compile.bench.builder import Builder
from zsmerge_compile.bench.check import check_decode
from zsmerge_compile.bench.our_steps import program
from zsmerge_compile.bench.policy_steps import BLOCK, compiled_policy, policy_step
from zsmerge_compile.bench.presets import Choice
from zsmerge_compile.bench.ratios import RED
from zsmerge_compile.bench.records import Results, load
from zsmerge_compile.bench.rows import Group, Row, pack
from zsmerge_compile.bench.session import CANNOT, Session
from zsmerge_compile.bench.timing import Plan
from zsmerge_compile.cli import main
from zsmerge_compile.cli.policy import every_policy
from zsmerge_compile.ops import contracts
from zsmerge_compile.ops.policy import CachePolicy

CPU = torch.device("cpu")
SHAPE = shapes.named("tiny", 1)
NAMES = tuple(policy.text for policy in every_policy())


def row(policy: str, budget: int = 48, batch: int = 1) -> Row:
    return Row("policy", batch, 100, budget, policy=policy)


def compiled(policy: str, batch: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zs, "compile", partial(zs.compile, backend="eager"))
        try:
            return compiled_policy(SHAPE.build("cpu", dtype), row(policy, batch=batch))
        except zs.ZSMergeError as error:
            pytest.skip(f"does not serve this model: {error}")


@pytest.mark.parametrize("name", NAMES)
def test_caches_are_full_and_steps_go_on_from_there(name: str) -> None:
    made = compiled(name)
    policy: CachePolicy = made.program.policy
    step = policy_step(made, row(name))
    first = int(made.cache.seen_tokens[0])
    assert first == (100 if policy.max_tokens is None else policy.max_tokens - 16)
    live = int((made.cache.layers[0].weight > 0).sum(-1).min())
    assert live >= min(first, made.report.layouts[0].budget) // 2, "merging may leave some free"
    for _ in range(3 * BLOCK):
        step.prepare()
        step.run()
    seen = int(made.cache.seen_tokens[0])
    assert seen == first + 3 * BLOCK if policy.max_tokens is None else first < seen <= policy.max_tokens
    assert step.cache_bytes == made.cache.nbytes and step.slots == 49
    plain = 2 * 16 * 4  # keys and values, head dim, fp32
    assert step.facts["slot_bytes"] > plain


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_each_policy_s_step_is_compared_with_its_own_rule(name: str, dtype: torch.dtype) -> None:
    """Positions by place in the cache among them, whose rule holds a tensor."""
    made = compiled(name, batch=2, dtype=dtype)
    verdict = check_decode(made.program)
    own = made.program.policy.decode_op is not contracts.DECODE
    assert verdict.ok and verdict.checked == (not own), verdict.text


def test_a_policy_with_an_op_of_its_own_is_not_checked_and_its_ratio_says_so() -> None:
    built = program(SHAPE.build("cpu", torch.float32), Row("op", 1, 64, 16))
    built.policy.decode_op = torch.ops.aten.clone.default
    verdict = check_decode(built)
    assert verdict.ok and verdict.word == "not checked" and "the op of zsmerge is none of" in verdict.text


def test_ratios_name_the_policy() -> None:
    plain = record("plain", 1.0, suite="policies", budget=12, slots=13)
    ours = [
        record("policy", ms, suite="policies", budget=12, slots=13, policy=name, check=check)
        for name, ms, check in (("h2o", 1.25, "green"), ("own", 2.0, "not checked"), ("broken", 0.5, "red"))
    ]
    told = {what.removeprefix("of plain attention's step: "): text for what, text in shown(plain, *ours).items()}
    assert told == {"h2o": "1.25x", "own, op not checked": "2.00x", "broken": RED}
    assert len({r.key for r in ours}) == 3


def test_rows_are_those_asked_for_and_share_no_cache() -> None:
    (group, _) = presets.policies(Choice(gpu=False))
    assert [r.policy for r in group.rows] == [None, *NAMES] and {r.slots for r in group.rows} == {4096}
    (group,) = presets.policies(Choice(gpu=False, quick=True, policies=("h2o", "h2o:recent=0.25")))
    assert [r.label() for r in group.rows[1:]] == ["policy h2o, 1,024 slots", "policy h2o:recent=0.25, 1,024 slots"]
    assert len({Builder.cache_of(r) for r in group.rows}) == 3
    need = group.rows[0].need(group.shape, group.dtype)
    memory = group.shape.parameters() * 4 + need
    assert pack(group, list(group.rows), memory) == [[r] for r in group.rows]


def test_what_cannot_be_made_says_why_and_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zs, "compile", partial(zs.compile, backend="eager"))
    results = Results.open(tmp_path / "r.json", "bench", {"device": "CPU"}, append=False)
    group = Group("policies", SHAPE, torch.float32, (row("snapkv", 16), row("h2o", 16)), Plan(rounds=2, warmup=1))
    Session(CPU, results, lambda text: None).run(group)
    absent, there = load(tmp_path / "r.json").records
    assert absent.status == "skipped" and str(absent.reason).startswith(f"{CANNOT}window must be at most the budget")
    assert there.status == "measured" and there.check == "green" and there.slot_bytes == pytest.approx(2 * 64 + 12)
    assert plan.missing([group], results, results.run.machine, CPU, 2**33) == []


def test_the_command_measures_policies_beside_plain_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zs, "compile", partial(zs.compile, backend="eager"))
    out = tmp_path / "r.json"
    given = ["bench", "--suite", "policies", "--quick", "--model", "tiny", "--layers", "1", "--budgets", "40"]
    given += ["--rounds", "1", "--device", "cpu", "--out", str(out)]
    assert main([*given, "--policies", "streaming:sinks=3", "zsmerge", "full"]) == 0
    told = json.loads(out.read_text())
    assert [r["policy"] for r in told["records"]] == [None, "streaming:sinks=3", "zsmerge", "full"]
    assert all(0 < r["ms"] < math.inf for r in told["records"]) and told["records"][0]["slot_bytes"] == 128
    whats = [ratio["what"].removeprefix("of plain attention's step: ") for ratio in told["ratios"]]
    assert whats == ["streaming:sinks=3", "zsmerge", "full"]
    text = out.with_suffix(".txt").read_text()
    assert "bytes / slot" in text and "policy streaming:sinks=3, 41 slots" in text
    capsys.readouterr()
    for more, sentence in (
        (["--policies", "lru"], "policy must be one of "),
        (["--policies", "h2o:size=3"], "parameters of h2o must be budget, recent"),
        (["--suite", "op", "--policies", "h2o"], "--policies must be given with --suite policies, got --suite op"),
    ):
        assert main([*given, *more]) == 2
        assert sentence in capsys.readouterr().err
