"""Every kind of row is measured on a tiny model, and a wrong kernel is never given a speed-up."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zsmerge_compile as zs
from zsmerge_compile.bench import shapes
from zsmerge_compile.bench.check import check_decode, check_extend
from zsmerge_compile.bench.fill import fill
from zsmerge_compile.bench.our_steps import program
from zsmerge_compile.bench.plain import PLAIN
from zsmerge_compile.bench.ratios import RED
from zsmerge_compile.bench.records import Results, load
from zsmerge_compile.bench.rows import Group, Row
from zsmerge_compile.bench.seam import instead
from zsmerge_compile.bench.session import Session
from zsmerge_compile.bench.timing import Plan
from zsmerge_compile.cli import main
from zsmerge_compile.lower.kernels import Kernel, decode_step
from zsmerge_compile.ops import contracts, reference
from zsmerge_compile.ops.state import LayerLayout, Rule, allocate

CPU = torch.device("cpu")
SHAPE = shapes.named("tiny", 1)


def session(path: Path, **options: Any) -> Session:
    return Session(CPU, Results(path / "r.json", {"device": "CPU"}, None, []), lambda text: None, **options)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_kind_of_row_gives_a_finite_time(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zs, "compile", partial(zs.compile, backend=backend))
    steps = (Row("dynamic", 2, 64), Row("static", 2, 64), Row("zsmerge", 2, 64, 16), Row("plain", 2, 64, 16))
    ops = (Row("op", 2, 64, 16), Row("op-plain", 2, 64, 16))
    prompts = (Row("prompt", 2, 48), Row("prompt-full", 2, 48, 16), Row("loop", 2, 0, 16), Row("generate", 2, 0, 16))
    chunked = (Row("prompt-chunked", 2, 48, 16),)
    running = session(tmp_path)
    for suite, rows in (("slots", steps + ops), ("prefill", prompts + chunked)):
        running.run(Group(suite, SHAPE, torch.float32, rows, Plan(rounds=2, warmup=1)))
    records = load(tmp_path / "r.json").records
    assert [(r.method, r.status, r.reason) for r in records] == [
        (row.method, "measured", None) for row in steps + ops + prompts + chunked
    ]
    assert all(r.ms is not None and 0 < r.ms < math.inf for r in records)
    checked = {r.method: r.check for r in records if r.check is not None}
    assert checked == dict.fromkeys(("zsmerge", "op", "prompt-full", "prompt-chunked", "loop", "generate"), "green")
    ours, plain = records[2], records[3]
    assert (ours.slots, ours.rounds, ours.peak_bytes) == (17, 2, None)
    assert ours.floor_ms == pytest.approx(((ours.weight_bytes or 0) + (ours.cache_bytes or 0)) / _bandwidth(tmp_path))
    assert plain.cache_bytes == 2 * 2 * 2 * 17 * 16 * 4  # K and V, rows, heads, slots, head dim, fp32
    assert "decode: " in str(ours.kernel)
    if backend == "inductor":  # the eager backend has no kernels to exchange
        assert "plain" in str(plain.kernel)


def _bandwidth(path: Path) -> float:
    found = load(path / "r.json").copy_gb_per_s
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


def test_a_filled_state_is_one_that_decoding_goes_on_from() -> None:
    layout = LayerLayout(heads=4, kv_heads=2, head_dim=8, proximity=5, context=6, residual=3)
    rule = Rule(5, 6, 0.6, 0.98, 8**-0.5)
    state = allocate(layout, 2, torch.float32)
    fill(state, 5, seen := 40)
    for step in range(8):
        ring = state.position[:, :, :6][state.weight[:, :, :6] > 0].view(2, 2, 5).sort(-1).values
        assert ring.tolist() == [[list(range(seen - 5, seen))] * 2] * 2
        total = state.weight.sum(-1)
        assert bool((total == 5 + 6 + 3 * 7 + step).all()), "every step merges one token, so none is lost"
        tokens = [torch.randn(2, heads, 1, 8) for heads in (4, 2, 2)]
        at = torch.full((2,), seen)
        _, state = reference.extend(state, *tokens, at, torch.zeros_like(at), rule)
        seen += 1


DECAY_AT = 9 + 2 + 5  # after the state, seen, active, and the rule's first five


def _no_decay(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """Ours, but scores never decay."""
    return decode_step(query, key, value, *rest[:DECAY_AT], 1.0, *rest[DECAY_AT + 1 :])


@pytest.mark.parametrize("kernel", [PLAIN, Kernel("forgetful", _no_decay)], ids=lambda kernel: kernel.name.split()[0])
def test_a_wrong_kernel_is_caught(kernel: Kernel) -> None:
    built = program(SHAPE.build("cpu", torch.float32), Row("op", 2, 64, 16))
    with instead(contracts.DECODE, kernel):
        verdict = check_decode(built, steps=1)
    assert not verdict.ok and "differ" in verdict.text, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_right_kernels_are_green(dtype: torch.dtype) -> None:
    built = program(SHAPE.build("cpu", dtype), Row("op", 2, 64, 40))
    for verdict in (check_decode(built), check_extend(built)):
        assert verdict.ok, verdict.text


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
    running = Session(torch.device("cuda"), Results(tmp_path / "r.json", {}, None, []), lambda text: None)
    rows = (Row("op", 2, 64, 16), Row("op-plain", 2, 64, 16), Row("zsmerge", 2, 64, 16), Row("dynamic", 2, 64))
    running.run(Group("slots", SHAPE, torch.bfloat16, rows, Plan(rounds=2, warmup=1, block=4)))
    records = load(tmp_path / "r.json").records
    assert [(r.status, r.reason) for r in records] == [("measured", None)] * 4
    assert [r.check for r in records] == ["green", None, "green", None]
    assert all((r.peak_bytes or 0) > 0 for r in records)
