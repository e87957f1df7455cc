"""The folder the trained model is shipped in: weights, tokenizer, figures, a held-out text and a README."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from training.corpus import SourceFile

MIN_PROMPT_TOKENS = 1_600
MAX_BYTES = 4_000_000  # the weights travel inside the wheel
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")

_README = """# {family}-stdlib

A {family} model of {parameters:,} parameters ({shape}; context trained to {context:,} tokens) that
continues Python source code and recalls facts planted in it. `{command}` trained it on the sources of Python
{python}'s standard library in {minutes:.0f} minutes ({hardware}); `training.json` holds the whole record.

Measured on {files} source files held out of training:

| | bits per byte | nats per token |
| --- | --- | --- |
| this model | {bits:.3f} | {loss:.3f} |
| token trigram, Witten-Bell | {trigram_bits:.3f} | {trigram_loss:.3f} |

Recall: the share of {prompts} prompts of held-out code, with facts at random depths and one question at the end, whose
answer (two tokens) is the most likely one.

{recall}

A fact is a line of its own, `key K17 = 4821`: a key from K00 to K99 (one token) and four digits (two). Keys of two
tokens (`key K1723 = 4821`) are asked for among others that begin alike. A question is the same line up to and including
the space after the equals sign. The context beyond {context:,} tokens was never trained. Some held-out files share code
with files trained on. One seed ({seed}).

The text is from Python's standard library, copyright Python Software Foundation, under the PSF licence
(https://docs.python.org/3/license.html): the model was trained on it, and `held_out.txt` is one of the files that
training never saw, `{held_out_text}`.
"""


def choose_prompt(held_out: list[SourceFile], tokenizer: PreTrainedTokenizerFast) -> SourceFile:
    """The shortest held-out file of at least MIN_PROMPT_TOKENS; SystemExit where there is none."""
    lengths = {file: len(tokenizer.encode(file.text, verbose=False)) for file in held_out}
    fitting = [file for file, length in lengths.items() if length >= MIN_PROMPT_TOKENS]
    if not fitting:
        raise SystemExit(f"No held-out file has {MIN_PROMPT_TOKENS:,} tokens: use another seed.")
    return min(fitting, key=lambda file: (lengths[file], file.name))


def environment() -> dict[str, Any]:
    """What the figures depend on besides the seed."""
    return {
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread used",
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def publish(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: SourceFile,
    record: dict[str, Any],
) -> None:
    """Writes the whole folder; SystemExit where the weights are too large to ship."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "held_out.txt").write_text(prompt.text, encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(record), encoding="utf-8")
    size = (folder / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"model.safetensors must be at most {MAX_BYTES:,} bytes, got {size:,}.")


def readme(record: Mapping[str, Any]) -> str:
    return _README.format(
        family=record["family"],
        shape=record["shape"],
        context=record["trained_context"],
        command=record["command"],
        parameters=record["parameters"],
        minutes=record["seconds"] / 60,
        hardware=record["hardware"],
        python=record["python"],
        files=len(record["held_out_files"]),
        bits=record["model"]["bits_per_byte"],
        loss=record["model"]["loss"],
        trigram_bits=record["trigram"]["bits_per_byte"],
        trigram_loss=record["trigram"]["loss"],
        prompts=record["recall"][0]["prompts"],
        recall=_recall_rows(record["recall"]),
        seed=record["seed"],
        held_out_text=record["held_out_text"],
    )


def _recall_rows(table: list[dict[str, Any]]) -> str:
    """A Markdown table: a row per kind of key and number of facts, a column per length."""
    lengths = sorted({row["length"] for row in table})
    share = {(row["key_tokens"], row["facts"], row["length"]): row["share"] for row in table}
    rows = [["tokens in a key", "facts", *(f"{length:,} tokens" for length in lengths)], ["---"] * (len(lengths) + 2)]
    for key, facts in sorted({(row["key_tokens"], row["facts"]) for row in table}):
        rows.append([str(key), str(facts), *(f"{share[key, facts, length]:.1%}" for length in lengths)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cpu_name() -> str:
    """Linux names the processor in /proc/cpuinfo only; elsewhere `platform` knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
