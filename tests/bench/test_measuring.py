"""Every kind of row is measured on a tiny model, and a wrong kernel is never given a speed-up."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import zsmerge_compile as zs
from zsmerge_compile.bench import memory, shapes
from zsmerge_compile.bench.our_steps import NEW_TOKENS, PROMPT, compiled_model, generate_step
from zsmerge_compile.bench.plain import PLAIN
from zsmerge_compile.bench.ratios import RED
from zsmerge_compile.bench.records import Results, load
from zsmerge_compile.bench.rows import Group, Row
from zsmerge_compile.bench.seam import instead
from zsmerge_compile.bench.session import Session
from zsmerge_compile.bench.timing import Plan
from zsmerge_compile.cli import main
from zsmerge_compile.ops import contracts

CPU = torch.device("cpu")
SHAPE = shapes.named("tiny", 1)


def session(path: Path, **options: Any) -> Session:
    results = Results.open(path / "r.json", "bench", {"device": "CPU"}, append=False)
    return Session(CPU, results, lambda text: None, **options)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_kind_of_row_gives_a_finite_time(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zs, "compile", partial(zs.compile, backend=backend))
    steps = (Row("dynamic", 2, 64), Row("static", 2, 64), Row("zsmerge", 2, 64, 16), Row("plain", 2, 64, 16))
    ops = (Row("op", 2, 64, 16), Row("op-plain", 2, 64, 16))
    whole = (Row("prompt", 2, 48), Row("prompt-full", 2, 48, 16), Row("loop", 2, 0, 16), Row("generate", 2, 0, 16))
    chunked = (Row("prompt-chunked", 2, 48, 16),)
    running = session(tmp_path)
    for suite, rows in (("slots", steps + ops), ("prefill", whole + chunked)):
        running.run(Group(suite, SHAPE, torch.float32, rows, Plan(rounds=2, warmup=1)))
    records = load(tmp_path / "r.json").records
    assert [(r.method, r.status, r.reason) for r in records] == [
        (row.method, "measured", None) for row in steps + ops + whole + chunked
    ]
    assert all(r.ms is not None and 0 < r.ms < math.inf for r in records)
    checked = {r.method: r.check for r in records if r.check is not None}
    assert checked == dict.fromkeys(("zsmerge", "op", "prompt-full", "prompt-chunked", "loop", "generate"), "green")
    ours, plain = records[2], records[3]
    assert (ours.slots, ours.rounds, ours.run) == (17, 2, 1)
    least = SHAPE.parameters() * 4 + (ours.cache_bytes or 0)
    assert ours.peak_of in (memory.CALL, memory.PROCESS) and least <= (ours.peak_bytes or 0) < 2**35
    assert all("tokens, 17 slots" in str(r.check_text) for r in records if r.method in ("loop", "generate"))
    assert all("steps, 2 rows, 17 slots" in str(r.check_text) for r in records if r.method in ("loop", "generate"))
    assert ours.floor_ms == pytest.approx(((ours.weight_bytes or 0) + (ours.cache_bytes or 0)) / _bandwidth(tmp_path))
    assert plain.cache_bytes == 2 * 2 * 2 * 17 * 16 * 4  # K and V, rows, heads, slots, head dim, fp32
    assert "decode: " in str(ours.kernel)
    assert f"graphs compiled: prefill {backend == 'inductor':d}, decode {backend == 'inductor':d}" in str(ours.kernel)
    if backend == "inductor":  # the eager backend has no kernels to exchange
        assert "plain" in str(plain.kernel)


def test_rows_may_ask_for_layers_outlined_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(zs, "compile", lambda *_, **given: asked.append(given.get("outline")))
    for how in (True, False, None):
        compiled_model(None, Row("zsmerge", 1, 64, 16, outline=how))
    assert asked == [True, False, None]


def _bandwidth(path: Path) -> float:
    found = load(path / "r.json").run.copy_gb_per_s
    assert found is not None
    return found * 1e6


def test_rows_that_cannot_be_measured_say_why(tmp_path: Path) -> None:
    running = session(tmp_path)
    running.run(Group("decode", SHAPE, torch.float32, (Row("dynamic", 4096, 10**6),)))
    running.deadline = 0.0
    running.run(Group("decode", SHAPE, torch.float32, (Row("dynamic", 1, 64),)))
    reasons = [record.reason for record in load(tmp_path / "r.json").records]
    assert [str(reason).split(":")[0][:5] for reason in reasons] == ["needs", "not m"]


def test_a_row_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr("zsmerge_compile.bench.transformers_steps.static_step", fails)
    rows = (Row("static", 1, 64), Row("dynamic", 1, 64))
    session(tmp_path).run(Group("decode", SHAPE, torch.float32, rows, Plan(rounds=1, warmup=0)))
    found = {record.method: (record.status, record.reason) for record in load(tmp_path / "r.json").records}
    assert found == {"static": ("failed", "RuntimeError: no such thing"), "dynamic": ("measured", None)}


@pytest.mark.parametrize("known", [True, False])
def test_the_peak_of_a_call_on_a_cpu(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**26
    if not known:
        monkeypatch.setattr(memory, "_reset", lambda: False)
    elif not memory._reset():
        pytest.skip("the kernel keeps its high-water mark to itself")
    found = memory.peak(lambda: torch.ones(size // 4).add_(1), CPU, weights=1000, held=100, before=0)
    if known:
        assert found.of == memory.CALL and 0.9 * size < found.bytes < 1.5 * size
    else:
        assert found.of == memory.PROCESS and found.bytes > size


def test_a_timed_generate_looks_for_an_end_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = zs.compile(SHAPE.build("cpu", torch.float32), zs.ZSMergeConfig(budget=16), backend="eager")
    made: list[Any] = []

    def generate(*given: Any, **options: Any) -> Any:
        made.append((options, type(compiled).generate(compiled, *given, **options)))
        return made[-1][1]

    monkeypatch.setattr(compiled, "generate", generate)
    generate_step(compiled, Row("generate", 1, 0, 16)).run()
    ((given, tokens),) = made
    assert given["eos_token_id"] == 256 and tokens.shape == (1, PROMPT + NEW_TOKENS)


def test_a_red_check_stops_ratios_and_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    arguments = ["bench", "--suite", "op", "--model", "tiny", "--budgets", "16", "--rounds", "1", "--device", "cpu"]
    with instead(contracts.DECODE, PLAIN):
        assert main([*arguments, "--out", str(out)]) == 1
    (ratio,) = json.loads(out.read_text())["ratios"]
    assert (ratio["value"], ratio["shown"]) == (None, RED)
    text = out.with_suffix(".txt").read_text()
    assert RED in text and "0x" not in text and RED in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_on_a_gpu(tmp_path: Path) -> None:
    results = Results.open(tmp_path / "r.json", "bench", {}, append=False)
    running = Session(torch.device("cuda"), results, lambda text: None)
    rows = (Row("op", 2, 64, 16), Row("op-plain", 2, 64, 16), Row("zsmerge", 2, 64, 16), Row("dynamic", 2, 64))
    running.run(Group("slots", SHAPE, torch.bfloat16, rows, Plan(rounds=2, warmup=1, block=4)))
    records = load(tmp_path / "r.json").records
    assert [(r.status, r.reason) for r in records] == [("measured", None)] * 4
    assert [r.check for r in records] == ["green", None, "green", None]
    assert all((r.peak_bytes or 0) > 0 for r in records)
