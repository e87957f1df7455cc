"""--policy: how it is read, what is refused, and that each command makes its cache by it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import zsmerge_compile as zs
from tests.models_zoo import tiny
from zsmerge_compile.cli import main
from zsmerge_compile.cli.policy import Choice, every_policy, keeps, policy
from zsmerge_compile.errors import ConfigError
from zsmerge_compile.policies import names

EAGER = ["--backend", "eager", "--device", "cpu"]
PROMPT = " ".join(f"w{i}" for i in range(2, 42))


@pytest.mark.parametrize(
    "text, name, parameters",
    [
        ("h2o", "h2o", {}),
        ("snapkv:window=16,pooling=max", "snapkv", {"window": 16, "pooling": "max"}),
        ("h2o:recent=0.25", "h2o", {"recent": 0.25}),
        ("pyramidkv:length=none,beta=1e1", "pyramidkv", {"length": None, "beta": 10.0}),
        ("x:a=true,b=False,c=nan", "x", {"a": True, "b": False, "c": "nan"}),
    ],
)
def test_values_are_numbers_words_or_text(text: str, name: str, parameters: dict[str, Any]) -> None:
    made = policy(text)
    assert (made.name, made.parameters) == (name, parameters)
    assert [type(value) for value in made.parameters.values()] == [type(value) for value in parameters.values()]
    assert policy(made.text) == made


@pytest.mark.parametrize("text", ["", ":", "h2o:", "h2o:recent", "h2o:=3", "h2o:recent=", "h2o:recent=1,recent=2"])
def test_what_is_no_policy_is_told(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"a policy must be NAME or .*, got {text}$"):
        policy(text)


def test_options_of_the_command_are_given_once() -> None:
    assert Choice("h2o").make(12, prefill="chunked").describe()["prefill"] == "chunked"
    assert Choice("snapkv", {"window": 4}).make(12, prefill=None).describe()["window"] == 4
    for given in ({"budget": 3}, {"prefill": "full"}):
        with pytest.raises(ConfigError, match="must be left to the command's other options, got h2o:"):
            Choice("h2o", given).make(12, prefill="full")


def test_every_policy_is_listed_once_and_says_what_it_keeps() -> None:
    listed = {choice.name for choice in every_policy()}
    assert listed == set(names()) - {"zeromerge"}
    assert "recent tokens" in keeps(Choice("zsmerge")) and keeps(Choice("snapkv", {"window": 16}))
    assert keeps(Choice("nothing")) == ""
    assert all(keeps(choice) for choice in every_policy())


def test_weights_are_given_to_policies_that_need_them_and_name_none() -> None:
    assert Choice("less").with_weights("llama") == Choice("less", {"weights": "llama"})
    assert Choice("less", {"weights": "my.safetensors"}).with_weights("llama").parameters["weights"] == "my.safetensors"
    assert Choice("h2o").with_weights("llama") == Choice("h2o")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("command", ["run", "export", "inspect", "check"])
def test_mistakes_are_told_in_the_registry_s_sentence(
    command: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"run": ["--prompt", "w5"], "export": [str(tmp_path / "bundle")]}.get(command, [])
    given = [command, str(checkpoint), *more, "--policy"]
    assert "policy must be one of " in refused([*given, "lru"], capsys)
    assert re.search("parameters of h2o must be budget, recent, .* 'size'", refused([*given, "h2o:size=3"], capsys))
    assert "kernel must be odd" in refused([*given, "snapkv:kernel=4"], capsys)
    if command in ("run", "export"):
        assert "unexpected keyword argument 'prefill'" in refused([*given, "snapkv", "--prefill", "full"], capsys)
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0 and "--policy" in capsys.readouterr().out.split("examples:")[1]


def test_run_keeps_what_the_policy_keeps(checkpoint: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "6", "--budget", "12", *EAGER]
    assert main([*arguments, "--policy", "streaming:sinks=3", "--prefill", "chunked"]) == 0
    captured = capsys.readouterr()
    made = zs.policy("streaming", budget=12, sinks=3, prefill="chunked")
    compiled = zs.compile(tiny("llama-gqa"), made, backend="eager")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = compiled.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert captured.out.split() == tokenizer.decode(expected[0, ids.shape[1] :]).split()
    assert main([*arguments, "--policy", "full"]) == 2
    assert "tokens seen must be at most 12" in capsys.readouterr().err


def test_a_bundle_and_its_inspection_name_the_policy(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    bundle = tmp_path / "bundle"
    assert main(["export", str(checkpoint), str(bundle), "--budget", "16", "--policy", "snapkv:window=4"]) == 0
    assert main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "name snapkv" in shown and "window 4" in shown
    assert "--policy must be left out with a bundle" in refused(
        ["run", str(bundle), "--prompt", "w5", "--policy", "h2o"], capsys
    )
    assert main(["inspect", str(checkpoint), "--budget", "40", "--policy", "pyramidkv:window=4,beta=4"]) == 0
    shown = capsys.readouterr().out
    assert "cache policy pyramidkv:window=4,beta=4" in shown and re.search(r"\b0\b.*\n.*\b1\b", shown)


@pytest.mark.parametrize("text", ["h2o", "pyramidkv:window=4", "lm_infinite"])
def test_check_compares_at_full_budget(text: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["check", str(checkpoint), "--examples", "3", "--small-budget", "6", "--policy", text]
    assert main(given) == 0
    told = capsys.readouterr().out
    assert "full budget: 3 cases" in told and "not checked: small budget: the oracle is ZSMerge" in told
