"""`zsmerge-compile check`: is the compiled model equivalent to the untouched one, for this checkpoint?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zsmerge_compile.cli.checkpoint import DTYPES, load_model
from zsmerge_compile.cli.console import add_backend, add_command, complain, console, count, notes

_EXAMPLES = """  zsmerge-compile check ~/models/Llama-3.2-1B
  zsmerge-compile check ~/models/falcon-rw-1b --examples 100 --backend inductor
"""


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "check",
        "compare a compiled checkpoint with the untouched model on random prompts",
        "At full budget the logits must be the model's own; at a small one, those of a plain ZSMerge over lists of "
        "tokens. The first difference is made as small as possible, and named with the layer it starts in. "
        "Exit status: 0 where no difference was found, 1 where one was.",
        _EXAMPLES,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="directory with config.json and weights")
    parser.add_argument("--examples", type=count, default=20, metavar="N", help="random cases to try (20)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of weights and cache (auto: as saved)")
    add_backend(parser, "eager")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> int:
    with notes().status("loading"):
        model = load_model(options.path, options.dtype)
    from zsmerge_compile.testing import EquivalenceError, check_equivalence

    try:
        with notes().status(f"comparing, up to {options.examples} cases each"):
            report = check_equivalence(model, examples=options.examples, backend=options.backend)
    except EquivalenceError as difference:
        complain(str(difference))
        return 1
    console().print(report)
    return 0
