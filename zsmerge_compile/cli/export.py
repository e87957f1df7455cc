"""`zsmerge-compile export`: a checkpoint as a bundle."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from zsmerge_compile.cli.checkpoint import DTYPES, load_model, load_tokenizer
from zsmerge_compile.cli.console import add_command, bytes_text, console, count, notes
from zsmerge_compile.cli.policy import add_policy
from zsmerge_compile.errors import InputError, must

_EXAMPLES = """  zsmerge-compile export ~/models/Llama-3.2-1B bundle/ --budget 1024
  zsmerge-compile export ~/models/Llama-3.2-1B bundle/ --format aoti --batch-size 8 --prefill chunked
  zsmerge-compile export ~/models/Llama-3.2-1B bundle/ --policy streaming:sinks=8 --budget 512
  zsmerge-compile run bundle/ --prompt "Once upon a time"
"""


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        "write a checkpoint with its cache as a bundle that runs without the model's code",
        "Formats: pt2 (any machine with PyTorch), aoti (machine code for this one), onnx (any ONNX runtime), "
        "tensorrt (this GPU; not run yet).",
        _EXAMPLES,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="directory with config.json, weights and tokenizer")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder to write, new or empty")
    parser.add_argument("--format", choices=("pt2", "aoti", "onnx", "tensorrt"), default="pt2", help="(pt2)")
    parser.add_argument("--budget", type=count, default=1024, metavar="N", help="slots per key/value head (1024)")
    parser.add_argument("--batch-size", type=count, default=1, metavar="N", help="rows of the cache (1)")
    add_policy(parser)
    parser.add_argument("--prefill", choices=("full", "chunked"), help="how prompts are read (full)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of weights and cache (auto: as saved)")
    parser.add_argument("--device", default="cpu", help="where the bundle will run (cpu)")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> int:
    import zsmerge_compile as zs
    from zsmerge_compile.lower import tensorrt_needs

    started, said = time.perf_counter(), notes()
    if options.format == "tensorrt":  # what is missing is told before the model is loaded
        tensorrt_needs.require()
        if not options.device.startswith("cuda"):
            raise InputError(must("--device", "cuda with --format tensorrt", options.device))
    policy = options.policy.make(options.budget, prefill=options.prefill)
    with said.status("loading"):
        model = load_model(options.path, options.dtype, options.device)
        try:
            tokenizer = load_tokenizer(options.path)
        except InputError:
            tokenizer = None
            said.print("no tokenizer found: the bundle takes token ids only")
    with said.status(f"exporting as {options.format}"):
        compiled = zs.compile(model, policy, options.batch_size, backend="eager")
        folder = zs.export(compiled, options.bundle, options.format, tokenizer=tokenizer)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    console().print(f"{folder}: {options.format}, {bytes_text(size)}, {time.perf_counter() - started:.0f} s")
    return 0
