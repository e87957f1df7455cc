"""Help, and mistakes: one plain sentence, exit status 2, no traceback."""

from pathlib import Path
from typing import Any

import pytest

import zsmerge_compile.testing
from zsmerge_compile.cli import main
from zsmerge_compile.cli.console import bytes_text
from zsmerge_compile.errors import EquivalenceError

COMMANDS = ("demo", "inspect", "check", "run")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out and f"zsmerge-compile {command}" in out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in COMMANDS)


def test_no_command_is_a_mistake() -> None:
    with pytest.raises(SystemExit) as done:
        main([])
    assert done.value.code == 2


@pytest.mark.parametrize("budget", ["2", "0%", "101%", "many", "-5"])
def test_impossible_budgets(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["run", ".", "--prompt", "w5", f"--budget={budget}"])
    assert done.value.code == 2
    assert "a budget must be at least 3 slots" in capsys.readouterr().err


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with exit status 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("command", [["inspect"], ["check"], ["run", "--prompt", "w5"]])
def test_paths_that_are_no_checkpoints(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"")
    assert "which is not there" in mistake([*command, str(tmp_path / "nowhere")], capsys)
    assert "which is a file" in mistake([*command, str(file)], capsys)
    assert "which has no config.json" in mistake([*command, str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "cannot be loaded" in mistake([*command, str(tmp_path)], capsys)


def test_unsupported_families_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)).save_pretrained(tmp_path)
    assert "GPT2LMHeadModel" in mistake(["inspect", str(tmp_path)], capsys)


def test_prompts_that_cannot_be_read(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(["run", str(checkpoint), "--prompt-file", str(checkpoint / "nowhere.txt")], capsys)
    assert "--prompt-file must be a readable text file" in said
    assert "--device must be" in mistake(["run", str(checkpoint), "--prompt", "w5", "--device", "cuda:99"], capsys)
    assert "at least one column" in mistake(
        ["run", str(checkpoint), "--prompt", "", "--backend", "eager", "--device", "cpu"], capsys
    )


def test_an_interrupt_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("zsmerge_compile.cli.demo.command", interrupted)
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_check_reports_and_fails(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(model: Any, **options: Any) -> str:
        options["progress"]("full budget", 1, options["max_examples"])
        if options["max_examples"] == 7:
            raise EquivalenceError("layer 1: outputs part at token 5")
        return "all equal"

    monkeypatch.setattr(zsmerge_compile.testing, "check_equivalence", check)
    assert main(["check", str(checkpoint)]) == 0
    assert "all equal" in capsys.readouterr().out
    assert main(["check", str(checkpoint), "--examples", "7"]) == 1
    assert "layer 1: outputs part at token 5" in capsys.readouterr().err


def test_bytes_are_written_in_binary_units() -> None:
    assert [bytes_text(size) for size in (0, 1023, 1536, 3 * 1024**2, 5 * 1024**3)] == [
        "0 bytes",
        "1,023 bytes",
        "1.5 KiB",
        "3.0 MiB",
        "5.00 GiB",
    ]
