"""kvpress's side of `tools/quality`: what reaches the table, and (where its environment exists) what it answers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from quality_tool import peers
from quality_tool.material import ASSETS
from quality_tool.methods import Method
from quality_tool.ours import judge
from tests.quality.test_ours import material, model
from zsmerge_compile.cli.demo import ASSETS as LLAMA

needs_kvpress = pytest.mark.skipif(
    not (peers.HOME / "installed").exists(), reason="needs kvpress's environment, which tools/quality makes"
)


class Heard:
    """A session that remembers what it is told."""

    def __init__(self, family: str) -> None:
        self.family, self.folder, self.material, self.model = family, LLAMA, material(), model()
        self.records = SimpleNamespace(presses={})
        self.cells: dict[tuple[str, float], Any] = {}

    def record(self, press: str, share: float, answers: Any) -> None:
        self.cells[press, share] = answers

    def record_absence(self, press: str, share: float, why: str) -> None:
        self.cells[press, share] = why


def test_falcon_cells_say_that_kvpress_does_not_support_it() -> None:
    heard = Heard("falcon")
    peers.judge(heard, [1.0, 0.2, 0.05])
    assert set(heard.cells) == {(press, share) for press in peers.PRESSES for share in (0.2, 0.05)}
    assert set(heard.cells.values()) == {"not supported by kvpress"}


def test_a_full_budget_alone_asks_nothing_of_kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "environment", lambda: pytest.fail("made an environment for no press"))
    heard = Heard("llama")
    peers.judge(heard, [1.0])
    assert heard.cells == {}


def test_a_press_that_fails_is_named_and_others_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is replaced by one that writes what it is asked for."""
    answers = {"losses": [1.0], "greedy": [[1]], "right": [[True]], "seconds": 1.0, "kept": [30]}

    def worker(python: Path, folder: Path, given: Any, jobs: list[tuple[str, float]], out: Path) -> None:
        out.mkdir()
        for press, share in jobs:
            failed = press == "SnapKVPress" and share == 0.05
            told = {"why_not": "AssertionError: window"} if failed else answers | {"parameters": {"n": 4}}
            peers.file_of(out, press, share).write_text(json.dumps(told))
        with torch.no_grad():
            logits = model()(torch.tensor([material().texts[0].prompt])).logits[0, -1].tolist()
        (out / "full.json").write_text(json.dumps({"logits": logits, "versions": {"kvpress": "0"}}))

    monkeypatch.setattr(peers, "run", worker)
    monkeypatch.setattr(peers, "environment", lambda: Path("python"))
    heard = Heard("llama")
    peers.judge(heard, [0.2, 0.05], tmp_path)
    assert heard.cells["SnapKVPress", 0.05] == "AssertionError: window"
    assert heard.cells["SnapKVPress", 0.2].losses == [1.0]
    kept = {"tokens kept per layer at 0.2": [30], "tokens kept per layer at 0.05": [30]}
    assert heard.records.presses["KnormPress"] == {"n": 4} | kept
    assert heard.records.presses["versions"] == {"kvpress": "0"}


def test_a_worker_that_breaks_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, env: subprocess.CompletedProcess(command, 3))
    (tmp_path / "KnormPress_0.2.json").write_text("what an earlier run found")
    with pytest.raises(SystemExit, match="must end with status 0, got 3"):
        peers.run(Path("python"), LLAMA, material(), [("KnormPress", 0.2)], tmp_path)
    assert not peers.file_of(tmp_path, "KnormPress", 0.2).exists()


def test_other_logits_than_ours_are_refused() -> None:
    prompt = material().texts[0].prompt
    with torch.no_grad():
        logits = model()(torch.tensor([prompt])).logits[0, -1]
    peers.check_logits(logits.tolist(), model(), prompt)
    for wrong in (logits * 1.01, logits * torch.nan):
        with pytest.raises(SystemExit, match="must be within 0.0001 of ours"):
            peers.check_logits(wrong.tolist(), model(), prompt)


@pytest.mark.slow
@needs_kvpress
def test_without_a_press_kvpress_answers_as_our_full_cache_does(tmp_path: Path) -> None:
    jobs = [("KnormPress", 1.0), ("KnormPress", 0.2)]
    for family in peers.FAMILIES:
        folder, out = ASSETS / f"{family}-stdlib", tmp_path / family
        peers.run(peers.environment(), folder, material(), jobs, out)
        full, pressed = (json.loads(peers.file_of(out, *job).read_text()) for job in jobs)
        ours = judge(AutoModelForCausalLM.from_pretrained(folder).eval(), Method({"residual": 0}), 300, material())
        assert full["losses"] == pytest.approx(ours.losses, abs=1e-4) != pressed["losses"]
        assert full["greedy"] == ours.greedy and full["right"] == ours.right


@pytest.mark.slow
@needs_kvpress
@torch.no_grad()
def test_streaming_llm_is_a_mask_over_one_uncompressed_pass(tmp_path: Path) -> None:
    """Whatever follows the prompt sees its 4 first and newest tokens, all at their own positions."""
    for family in peers.FAMILIES:
        folder = ASSETS / f"{family}-stdlib"
        peers.run(peers.environment(), folder, material(), [("StreamingLLMPress", 0.2)], tmp_path)
        told = json.loads(peers.file_of(tmp_path, "StreamingLLMPress", 0.2).read_text())
        untouched = AutoModelForCausalLM.from_pretrained(folder).eval()
        for text, loss in zip(material().texts, told["losses"], strict=True):
            ids, end = torch.tensor([text.prompt + text.truth]), len(text.prompt)
            seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            seen[end:, 4 : end - (told["kept"][0] - 4)] = False
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
            positions = torch.arange(ids.shape[1])[None]
            logits = untouched(ids, attention_mask=mask, position_ids=positions).logits[0, end - 1 : -1]
            assert loss == pytest.approx(float(functional.cross_entropy(logits, ids[0, end:])), abs=1e-4)


@pytest.mark.slow
@needs_kvpress
def test_what_a_press_loses_at_small_budgets_is_named(tmp_path: Path) -> None:
    """150 tokens: 75 hold SnapKV's window of 64, 30 do not, and 3 not even StreamingLLM's sinks."""
    jobs = [("SnapKVPress", 0.5), ("SnapKVPress", 0.2), ("StreamingLLMPress", 0.02), ("PyramidKVPress", 0.2)]
    peers.run(peers.environment(), LLAMA, material(), jobs, tmp_path)
    told = [json.loads(peers.file_of(tmp_path, *job).read_text()).get("why_not") for job in jobs]
    assert told[0] is None and told[1] is not None and told[2] is not None
    assert "window_size must be at most" in told[1] and "n_sink must be at most" in told[2]
    assert told[3] == "no pyramid: kvpress falls back to SnapKV"
