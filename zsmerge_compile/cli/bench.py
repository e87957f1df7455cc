"""`zsmerge-compile bench`: decode steps, prompts and compile times on this machine; `tools/bench` is the same."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zsmerge_compile.cli.console import add_command, count
from zsmerge_compile.cli.policy import policy

SUITES = (
    "op",
    "figure3",
    "slots",
    "decode",
    "flat",
    "prefill",
    "generate",
    "policies",
    "table1",
    "table1-static",
    "families",
    "outline",
    "compile",
)
_EXAMPLES = """  zsmerge-compile bench --quick                       # two to three minutes
  zsmerge-compile bench                               # all suites for this device; `--list` tells what that is
  zsmerge-compile bench --suite decode --model llama-3-8b --layers 4 --contexts 4096 16384 --batches 1 8
  zsmerge-compile bench --suite slots --budgets 1023 4095 16383 --dtype bfloat16
  zsmerge-compile bench --suite policies --policies h2o snapkv:window=16,pooling=max --budgets 1023
"""


def minutes(text: str) -> float:
    """argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"minutes must be a number above 0, got {text}")
    return value


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "bench",
        "time decode steps, prompts and compiling beside transformers and plain attention",
        "Models have the shapes of well-known checkpoints and random weights. Figures go to a JSON file after every "
        "row, with tables (.txt) and plots (.png) beside it. Exit status: 1 where a kernel's check against the "
        "reference is red (no speed-up is told then) or a row of ours failed.",
        _EXAMPLES,
    )
    parser.add_argument("--suite", choices=SUITES, nargs="+", help="what to measure (all that suit the device)")
    parser.add_argument("--quick", action="store_true", help="few layers, few rounds")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="only tell what would be measured, and what it needs")
    instead.add_argument("--blank", action="store_true", help="write all rows as 'not measured'; no device is needed")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--model", metavar="NAME", help="llama-125m, llama-2-7b, llama-3-8b, mistral-7b ...")
    parser.add_argument("--layers", type=count, metavar="N", help="of the model (as many as the suite says)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float32; on a GPU bfloat16")
    parser.add_argument("--batches", type=count, nargs="+", metavar="N", help="rows of the cache")
    parser.add_argument("--contexts", type=count, nargs="+", metavar="N", help="tokens seen, or of a prompt")
    parser.add_argument("--budgets", type=count, nargs="+", metavar="N", help="slots per key/value head")
    parser.add_argument(
        "--policies",
        type=policy,
        nargs="+",
        metavar="POLICY",
        help="NAME or NAME:key=value,... of suite policies (all)",
    )
    parser.add_argument("--rounds", type=count, metavar="N", help="timed blocks of each row")
    parser.add_argument("--threads", type=count, metavar="N", help="CPU threads (torch's own choice)")
    parser.add_argument("--minutes", type=minutes, metavar="M", help="start no group that would not end in time")
    parser.add_argument(
        "--out", type=Path, default=Path("bench.json"), metavar="FILE", help="a .json file (bench.json)"
    )
    parser.add_argument("--append", action="store_true", help="keep what FILE holds; rows measured again are replaced")
    parser.add_argument(
        "--missing",
        action="store_true",
        help="with --append: only groups of rows that FILE has not whole from this machine and these versions",
    )
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> int:
    from zsmerge_compile.bench.command import run

    return run(options)
