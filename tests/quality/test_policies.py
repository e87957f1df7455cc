"""Policies in `tools/quality`: which rows they are, that they are added to what is there, and the table of all."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quality_tool import ours, policy_table
from quality_tool import session as sessions
from quality_tool.__main__ import main, parse_arguments
from quality_tool.material import QUICK
from quality_tool.methods import FULL_CACHE, METHODS, Method, default_policies, methods_of
from quality_tool.records import Records
from quality_tool.session import Session
from tests.bench.test_figures import record
from tests.quality.test_ours import material, model
from zsmerge_compile.bench.records import Record, Results
from zsmerge_compile.cli.policy import Choice, policy
from zsmerge_compile.policies import names

CONDITIONS = {"command": "tools/quality", "texts": 2, "recall prompts": 2, "prompt tokens": 150}


def test_every_policy_is_measured_once() -> None:
    named = parse_arguments(["--no-peers"]).methods
    assert {choice.name for choice in default_policies()} == set(names()) - {"full", "h2o", "zeromerge", "zsmerge"}
    assert list(named) == [*METHODS, *(choice.text for choice in default_policies())]
    assert methods_of(map(Choice, ("h2o", "full", "zsmerge"))) == {
        name: METHODS[name] for name in ("H2O", "zsmerge, segment")
    }
    own = policy("h2o:recent=0.25")
    assert methods_of([own]) == {"h2o:recent=0.25": Method({}, policy=own)}


def test_named_methods_and_policies_are_measured_alone() -> None:
    options = parse_arguments(["--policies", "snapkv:window=16", "h2o"])
    assert list(options.methods) == ["snapkv:window=16", "H2O"] and options.adds and not options.peers
    options = parse_arguments(["--methods", "eviction only"])
    assert list(options.methods) == ["eviction only"] and options.adds and options.peers
    options = parse_arguments(["--methods", "eviction only", "--policies", "streaming"])
    assert list(options.methods) == ["eviction only", "streaming"] and options.peers
    assert not parse_arguments([]).adds and parse_arguments([]).peers


@pytest.mark.parametrize(
    "given, sentence",
    [
        (["--policies", "lru"], "policy must be one of "),
        (["--policies", "h2o:size=3"], "parameters of h2o must be budget, recent"),
        (["--policies", "h2o:"], "a policy must be NAME or NAME:key=value"),
        (["--policies", "h2o", "--ablations"], "--policies must be given without --ablations"),
    ],
)
def test_mistakes(given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        parse_arguments(given)
    assert done.value.code == 2 and sentence in capsys.readouterr().err


def test_a_policy_by_its_name_is_the_method_with_its_fields() -> None:
    one, other = (ours.judge(model(), method, 24, material()) for method in (METHODS["H2O"], _h2o()))
    assert one.losses == other.losses and one.right == other.right


def _h2o() -> Method:
    return Method({}, policy=Choice("h2o"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 150 tokens, of which a share of 0.2 is 30 slots."""
    monkeypatch.setattr(sessions.materials, "make", lambda tokenizer, size: material())
    monkeypatch.setattr(sessions, "PROMPT", 150)


def session(path: Path, keep: bool, **changes: Any) -> Session:
    records = Records.read(path) if path.exists() else Records(path)
    return Session("llama", Method({}), QUICK, records, CONDITIONS | changes, Console(file=io.StringIO()), keep)


def test_cells_are_added_to_those_of_other_methods(tmp_path: Path, small: None) -> None:
    path = tmp_path / "q.json"
    session(path, keep=False).ours({"zsmerge, segment": METHODS["zsmerge, segment"]}, [0.2])
    before = {cell["method"]: cell for cell in Records.read(path).cells}
    again = session(path, keep=True, command="tools/quality --policies snapkv full")
    again.ours(
        methods_of(map(policy, ("snapkv:window=4", "snapkv"))) | {"full": Method({}, policy=Choice("full"))}, [0.2]
    )
    found = Records.read(path)
    assert found.methods() == [FULL_CACHE, "zsmerge, segment", "snapkv:window=4", "snapkv", "full"]
    cells = {cell["method"]: cell for cell in found.cells}
    assert cells["zsmerge, segment"] == before["zsmerge, segment"]
    assert cells["snapkv:window=4"]["slots"] == 30 and 0 < cells["snapkv:window=4"]["loss"]["mean"] < 9
    assert cells["snapkv"]["why_not"].startswith("window must be at most the budget of 30 slots")
    assert "must be at most 30" in cells["full"]["why_not"]
    assert found.conditions["llama"]["command"] == "tools/quality; tools/quality --policies snapkv full"
    session(path, keep=True)
    assert len(Records.read(path).cells) == len(found.cells), "the full cache's cell takes the place of the old one"
    with pytest.raises(
        SystemExit, match="must be those of this run, which adds to them, got other texts; name another"
    ):
        session(path, keep=True, texts=32)
    told = json.loads(path.read_text())
    told["cells"][0]["loss"]["mean"] += 0.1
    path.write_text(json.dumps(told))
    with pytest.raises(SystemExit, match="full cache's loss of llama must be .*, as recorded"):
        session(path, keep=True)
    session(path, keep=False, texts=32)
    assert Records.read(path).methods() == [FULL_CACHE], "a run of everything begins anew"


def test_weights_are_those_shipped_with_the_model(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Any] = []
    begun = session(tmp_path / "q.json", keep=False)
    monkeypatch.setattr(ours, "judge", lambda model, method, *_: judged.append(method.policy) or begun.full)
    begun.ours(methods_of([Choice("less")]), [0.2])
    assert judged[0] == Choice("less", {"weights": "llama"}) and begun.records.methods() == [FULL_CACHE, "less"]


def cell(model: str, method: str, share: float | None, loss: float = 0.0, recall: float = 0.0) -> dict[str, Any]:
    figures = {"loss": {"mean": 2 + loss}, "loss_added": {"mean": loss}, "recall": {"mean": recall}}
    return {"model": model, "method": method, "share": share, **figures}


def step(method: str, ms: float, **changes: Any) -> Record:
    return record(method, ms, suite="policies", budget=12, slots=13, run=1, slot_bytes=128.0, **changes)


def test_the_table_has_keeps_bytes_times_and_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(tmp_path / "q.json")
    for family in ("llama", "falcon"):
        records.conditions[family] = CONDITIONS
        records.add(**cell(family, FULL_CACHE, None, recall=1.0))
        for share, loss in ((0.2, 0.1), (0.1, 0.2), (0.05, 0.4)):
            records.add(**cell(family, "zsmerge, segment", share, loss, recall=0.25))
            if family == "llama" and share > 0.05:
                records.add(**cell(family, "snapkv:window=4", share, 2 * loss))
            else:
                records.add(model=family, method="snapkv:window=4", share=share, slots=3, why_not="no room")
    rows = [step("plain", 1.0), step("policy", 1.5, policy="full", check="green")]
    rows += [step("policy", 1.2, policy="zsmerge", check="green"), step("policy", 9.0, policy="h2o", check="red")]
    rows.append(replace(step("policy", 2.0, policy="streaming", check="not checked"), slot_bytes=140.4))
    results = Results.open(tmp_path / "b.json", "bench", {"device": "CPU"}, append=False)
    for row in rows:
        results.add(row)
    main(["--out", str(records.path), "--policy-table", str(results.path)])
    lines = capsys.readouterr().out.splitlines()
    head, rule, full, zsmerge = lines[:4]
    assert head.startswith("| policy | keeps | bytes per slot, cpu | step to plain attention's, cpu, 13 slots |")
    assert head.endswith("| loss added, 20% / 10% / 5% | recall, 20% / 10% / 5% |")
    assert rule.count("---") == 6
    assert full == "| full | everything; a row that needs more slots is refused | 128 | 1.50 | (loss 2.00) | 100% |"
    assert zsmerge.endswith("the rest merged | 128 | 1.20 | +0.10 / +0.20 / +0.40 | 25% / 25% / 25% |")
    told = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}
    assert set(names()) - {"zeromerge"} < set(told) and "op check red" in told["h2o"]
    assert "| 140 | 2.00\\* | – / – / – |" in told["streaming"]
    assert "| – | – | +0.20 / +0.40 / – (llama) | 0% / 0% / – (llama) |" in told["snapkv:window=4"]
    text = "\n".join(lines)
    assert "means of llama, falcon" in text and "of 128 bytes per slot" in text and "\\*: the op has no" in text
    assert "- snapkv:window=4, llama at 5%, falcon at 20%, falcon at 10%, falcon at 5%: no room" in text


def test_the_table_needs_no_bench(tmp_path: Path) -> None:
    records = Records(tmp_path / "q.json")
    assert policy_table.markdown(records, []).splitlines()[0].startswith("| policy | keeps | loss added")
