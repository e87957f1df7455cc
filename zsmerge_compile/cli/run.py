"""`zsmerge-compile run`: one prompt through a checkpoint directory or a bundle."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsmerge_compile.cli.checkpoint import DTYPES, default_device, is_bundle, load_model, load_tokenizer
from zsmerge_compile.cli.console import (
    BUDGET_HELP,
    Budget,
    add_backend,
    add_command,
    budget,
    bytes_text,
    count,
    notes,
    temperature,
)
from zsmerge_compile.cli.policy import ZSMERGE, add_policy
from zsmerge_compile.errors import InputError, must

if TYPE_CHECKING:
    from zsmerge_compile.runtime.runner import Runner

_EXAMPLES = """  zsmerge-compile run ~/models/Llama-3.2-1B --prompt "The three laws of robotics are"
  zsmerge-compile run ~/models/Llama-3.2-1B --prompt-file report.txt --budget 10% --max-new-tokens 400
  zsmerge-compile run ~/models/Llama-3.2-1B --prompt-file report.txt --policy snapkv:window=16,pooling=max
  zsmerge-compile run bundle/ --prompt "def main("
  git diff | zsmerge-compile run ~/models/Mistral-7B-v0.1 --prompt-file - --prefill chunked --temperature 0.7 --seed 1
"""

_FIXED: dict[str, tuple[Any, str]] = {
    "budget": (Budget(slots=1024), "--budget"),
    "policy": (ZSMERGE, "--policy"),
    "prefill": (None, "--prefill"),
    "dtype": ("auto", "--dtype"),
    "device": (None, "--device"),
    "backend": ("inductor", "--backend"),
}


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "run",
        "continue a prompt with any local checkpoint or bundle, over a cache of fixed size",
        "The text goes to standard output as it is written, figures to standard error.",
        _EXAMPLES,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="checkpoint directory, or a bundle")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file with the prompt; - reads stdin")
    parser.add_argument("--budget", type=budget, default=Budget(slots=1024), metavar="N", help=BUDGET_HELP)
    add_policy(parser)
    parser.add_argument("--prefill", choices=("full", "chunked"), help="how the prompt is read (full)")
    parser.add_argument("--max-new-tokens", type=count, default=200, metavar="N", help="tokens to write at most (200)")
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="0: the likeliest token (0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of weights and cache (auto: as saved)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (cuda where there is one)")
    add_backend(parser, "inductor", "tensorrt")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> int:
    text = _prompt(options)
    import torch
    from transformers import TextStreamer

    import zsmerge_compile as zs

    said = notes()
    if is_bundle(options.path):
        _check_fixed(options)
        with said.status("loading"):
            compiled: Runner = zs.load(options.path)
            tokenizer = _tokenizer_of(options.path)
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(compiled.device)
        length = inputs["input_ids"].shape[1]
    else:
        with said.status("loading"):
            tokenizer = load_tokenizer(options.path)
            inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            length = inputs["input_ids"].shape[1]
            policy = options.policy.make(options.budget.of(length), prefill=options.prefill)
            model = load_model(options.path, options.dtype, options.device or default_device())
        inputs = inputs.to(model.device)
        with said.status("compiling"):
            compiled = zs.compile(model, policy, backend=options.backend)
    torch.manual_seed(options.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    out = compiled.generate(**inputs, max_new_tokens=options.max_new_tokens, streamer=streamer, **sampling)
    said.print(_figures(compiled, length, out.shape[1] - length, time.perf_counter() - started), style="dim")
    return 0


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        return str(options.prompt)
    if str(options.prompt_file) == "-":
        return sys.stdin.read()
    try:
        return str(options.prompt_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        expected, got = "a readable text file (UTF-8)", f"{options.prompt_file}: {type(error).__name__}"
        raise InputError(must("--prompt-file", expected, got)) from error


def _check_fixed(options: argparse.Namespace) -> None:
    """A bundle has these from its export."""
    for name, (default, flag) in _FIXED.items():
        given = getattr(options, name)
        if given != default:
            told = given.text if name == "policy" else given
            raise InputError(must(flag, "left out with a bundle, which has its own", told))


def _tokenizer_of(bundle: Path) -> Any:
    folder = bundle / "tokenizer"
    if not folder.is_dir():
        raise InputError(must("bundle", "one with a tokenizer", str(bundle), "zs.export(..., tokenizer=tokenizer)"))
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _figures(compiled: Runner, prompt: int, new: int, seconds: float) -> str:
    layers = compiled.cache.layers
    slots = sorted({layer.key.shape[2] - 1 for layer in layers})
    token = sum(2 * layer.key.shape[1] * layer.key.shape[3] for layer in layers) * compiled.dtype.itemsize
    return (
        f"{prompt:,} tokens read and {new:,} written in {seconds:.1f} s (compiling at first use included); cache "
        f"{bytes_text(compiled.cache.nbytes)} in {' or '.join(f'{n:,}' for n in slots)} slots per head, "
        f"full cache by now {bytes_text(token * (prompt + new - 1))}"
    )
