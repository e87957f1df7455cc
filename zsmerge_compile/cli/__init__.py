"""The command line, `zsmerge-compile`. Importing it and printing help import neither torch nor transformers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from zsmerge_compile.cli import bench, check, demo, export, inspect, run
from zsmerge_compile.cli.console import complain
from zsmerge_compile.errors import ZSMergeError

_EXAMPLES = """examples:
  zsmerge-compile demo
  zsmerge-compile run ~/models/Llama-3.2-1B --prompt "Once upon a time" --budget 512
  zsmerge-compile inspect ~/models/Llama-3.2-1B --graphs graphs/
  zsmerge-compile check ~/models/Llama-3.2-1B
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status: 0, 1 for a check that failed, 2 for a mistake, 130 for an interrupt."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except ZSMergeError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zsmerge-compile",
        description="A Hugging Face causal LM compiled with a KV cache that never grows.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (demo, inspect, check, export, run, bench):
        module.add(commands)
    return parser
