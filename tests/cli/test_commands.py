"""run, inspect and demo over tiny models, with the eager backend."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.models_zoo import prompt, tiny
from zsmerge_compile.cli import demo, main
from zsmerge_compile.cli.comparison import Material
from zsmerge_compile.errors import InputError

EAGER = ["--backend", "eager", "--device", "cpu"]


def test_run_writes_what_the_untouched_model_would(
    checkpoint: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "w5 w9 w17 w3 w44"
    assert main(["run", str(checkpoint), "--prompt", text, "--max-new-tokens", "8", "--budget", "64", *EAGER]) == 0
    captured = capsys.readouterr()
    ids = torch.tensor([[5, 9, 17, 3, 44]])
    expected = tiny("llama-gqa").generate(ids, max_new_tokens=8, do_sample=False)[0, 5:]
    assert captured.out.split() == tokenizer.decode(expected).split()
    assert "5 tokens read and 8 written" in captured.err and "64 slots per head" in captured.err


def test_run_reads_files_and_samples(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text(" ".join(f"w{i}" for i in range(2, 102)))
    arguments = ["run", str(checkpoint), "--prompt-file", str(tmp_path / "prompt.txt"), "--budget", "10%", *EAGER]
    arguments += ["--max-new-tokens", "6", "--prefill", "chunked"]
    texts = []
    for extra in ([], ["--temperature", "2", "--seed", "1"]):
        assert main([*arguments, *extra]) == 0
        captured = capsys.readouterr()
        assert "in 10 slots per head" in captured.err
        texts.append(captured.out)
    assert texts[0] != texts[1]


def test_a_bundle_is_exported_inspected_and_run(
    checkpoint: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    assert main(["export", str(checkpoint), str(bundle), "--budget", "64"]) == 0
    assert f"{bundle}:pt2," in "".join(capsys.readouterr().out.split())  # wrapped, wherever the path ends
    assert main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    for word in ("pt2", "budget 64", "decode.pt2", "weights.safetensors", "tokenizer.json", "residual_key"):
        assert word in shown, shown
    assert main(["run", str(bundle), "--prompt", "w5 w9 w17 w3 w44", "--max-new-tokens", "8"]) == 0
    captured = capsys.readouterr()
    expected = tiny("llama-gqa").generate(torch.tensor([[5, 9, 17, 3, 44]]), max_new_tokens=8, do_sample=False)[0, 5:]
    assert captured.out.split() == tokenizer.decode(expected).split()
    assert "64 slots per head" in captured.err
    assert main(["run", str(bundle), "--prompt", "w5", "--budget", "12"]) == 2
    assert "--budget must be left out with a bundle" in capsys.readouterr().err.replace("\n", " ")


def test_inspect_shows_sites_passes_and_bytes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    graphs = tmp_path / "graphs"
    arguments = ["--budget", "16", "--batch-size", "2", "--length", "100", "--graphs", str(graphs)]
    assert main(["inspect", str(checkpoint), *arguments]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM: 2 attention sites" in out and "0-1" in out and "causal" in out
    assert "insert_cache" in out and "normalize_attention" in out
    full = 2 * 2 * 2 * 100 * 2 * 8 * 4 / 1024  # key and value, layers, rows, tokens, heads, head dim, bytes
    assert f"{full:,.1f} KiB" in out
    for graph in ("prefill", "decode"):
        names = sorted(path.name for path in (graphs / graph).iterdir())
        assert names[0] == "00_captured.py" and len(names) >= 3


@pytest.fixture(scope="module")
def material() -> Material:
    ids = prompt(1, 60)["input_ids"]
    return Material(ids[:, :40], ids[:, 40:], new_tokens=5)


def test_demo_compares_methods(material: Material) -> None:
    model = tiny("llama-gqa")
    full, half, tenth = rows = demo.compare(model, material, (0.5, 0.1), "eager")
    assert [row.slots for row in rows] == [59, 20, 4]
    assert [row.method for row in rows] == ["full cache", "50% budget", "10% budget"]
    with torch.no_grad():
        logits = model(torch.cat([material.prompt, material.truth], 1)).logits[0, 39:-1]
    assert full.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, material.truth[0])), rel=1e-4)
    assert full.cache_bytes == 2 * 2 * 59 * 2 * 8 * 4 and tenth.cache_bytes < half.cache_bytes < full.cache_bytes
    assert all(row.ms_per_token > 0 and len(row.written) == 5 for row in rows)


def test_demo_gives_the_same_figures_within_the_budget(material: Material) -> None:
    """The first budget + 1 tokens are exact: 40 of the prompt and one more."""
    short = Material(material.prompt, material.truth[:, :2], new_tokens=2)
    full, all_of_it = demo.compare(tiny("llama-gqa"), short, (1.0,), "eager")
    assert all_of_it.loss == pytest.approx(full.loss, rel=1e-4) and all_of_it.written == full.written


def test_demo_prints_table_conditions_and_texts(material: Material, tokenizer: Any) -> None:
    model = tiny("llama-gqa")
    rows = demo.compare(model, material, (0.5,), "eager")
    out = Console(width=100, record=True, file=io.StringIO())
    out.print(demo.figures(rows), demo.conditions(model, material, "eager"), demo.texts(tokenizer, material, rows, out))
    text = out.export_text()
    assert "full cache" in text and "50% budget" in text and "the file goes on" in text
    assert "prompt of 40" in text and torch.__version__ in text


def test_demo_cuts_the_held_out_text(tokenizer: Any) -> None:
    text = " ".join(f"w{i}" for i in range(2, 42))
    cut = demo.cut(tokenizer, text, 30, 10, 4)
    assert cut.prompt.tolist() == [list(range(2, 32))] and cut.truth.tolist() == [list(range(32, 42))]
    with pytest.raises(InputError, match="--prompt-tokens and --truth-tokens together must be at most 40"):
        demo.cut(tokenizer, text, 31, 10, 4)
