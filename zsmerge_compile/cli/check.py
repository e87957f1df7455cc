"""`zsmerge-compile check`: is the compiled model equivalent to the untouched one, for this checkpoint?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zsmerge_compile.cli.checkpoint import DTYPES, load_model
from zsmerge_compile.cli.console import add_backend, add_command, complain, console, count, notes
from zsmerge_compile.cli.policy import ROOMY, ZSMERGE, add_policy
from zsmerge_compile.errors import EquivalenceError

_EXAMPLES = """  zsmerge-compile check ~/models/Llama-3.2-1B
  zsmerge-compile check ~/models/Mistral-7B-v0.1 --max-length 5000      # past its sliding window
  zsmerge-compile check ~/models/falcon-rw-1b --examples 100 --seed 3 --backend inductor
  zsmerge-compile check ~/models/Llama-3.2-1B --policy snapkv:window=16  # at full budget only
"""


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "check",
        "compare a compiled checkpoint with the untouched model on random prompts",
        "At full budget the logits must be the model's own; at a small one, those of a plain ZSMerge over lists of "
        "tokens (another --policy is checked at full budget only). The first difference is made as small as possible, "
        "and named with the layer it starts in. Exit status: 0 where no difference was found, 1 where one was.",
        _EXAMPLES,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="directory with config.json and weights")
    parser.add_argument("--examples", type=count, default=20, metavar="N", help="random cases of each check (20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the cases (0)")
    parser.add_argument("--small-budget", type=count, default=24, metavar="N", help="slots of the second check (24)")
    parser.add_argument("--max-length", type=count, metavar="N", help="tokens of a prompt at most (twice small budget)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of weights and cache (auto: as saved)")
    add_policy(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (cpu)")
    add_backend(parser, "eager", "tensorrt")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> int:
    options.policy.make(ROOMY)  # what is wrong with it is told before the model is loaded
    with notes().status("loading"):
        model = load_model(options.path, options.dtype, options.device)
    try:
        report = _check(model, options)
    except EquivalenceError as difference:
        complain(str(difference))
        return 1
    console().print(str(report), markup=False, soft_wrap=True)
    return 0


def _check(model: Any, options: argparse.Namespace) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from zsmerge_compile.testing import check_equivalence

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes(), transient=True) as progress:
        task = progress.add_task("compiling", total=options.examples)

        def tell(check: str, done: int, most: int) -> None:
            progress.update(task, description=check, completed=done, total=most)

        return check_equivalence(
            model,
            backend=options.backend,
            max_examples=options.examples,
            seed=options.seed,
            budget_small=options.small_budget,
            max_length=options.max_length,
            policy=None if options.policy == ZSMERGE else options.policy.make,
            progress=tell,
        )
