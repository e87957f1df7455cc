"""What the commands share: consoles, argument types, how numbers are written."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

BUDGET_HELP = "slots per key/value head (1024), or a share such as 10%% of the length"


@dataclass(frozen=True)
class Budget:
    """--budget: slots, or a share of a length that is known later."""

    slots: int | None = None
    share: float | None = None

    def of(self, length: int) -> int:
        """Slots per key/value head; a share counts of `length` tokens."""
        return self.slots if self.slots is not None else max(3, round((self.share or 0) * length))


def budget(text: str) -> Budget:
    """argparse type: `512` slots, or `10%`."""
    try:
        found = Budget(share=float(text[:-1]) / 100) if text.endswith("%") else Budget(slots=int(text))
    except ValueError:
        found = Budget(slots=0)
    if found.share is not None and not 0 < found.share <= 1 or found.slots is not None and found.slots < 3:
        raise argparse.ArgumentTypeError(f"a budget must be at least 3 slots, or a share up to 100%, got {text}")
    return found


def count(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a count must be an integer of at least 1, got {text}")
    return int(text)


def temperature(text: str) -> float:
    """argparse type: a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"a temperature must be a number of at least 0, got {text}")
    return value


def add_command(commands: Any, name: str, summary: str, text: str, examples: str) -> argparse.ArgumentParser:
    """A subparser with its description and examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary.replace("%", "%%"),
        description=textwrap.fill(f"{summary[0].upper()}{summary[1:]}. {text}", 80),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_backend(parser: argparse.ArgumentParser, default: str, *more: str) -> None:
    choices = ("inductor", "eager", *more)
    parser.add_argument("--backend", choices=choices, default=default, help=f"what runs the graphs ({default})")


def console() -> Console:
    """Results, on standard output."""
    return Console(highlight=False)


def notes() -> Console:
    """Progress and remarks, on standard error, so that results can be piped."""
    return Console(stderr=True, highlight=False)


def complain(sentence: str) -> None:
    """One plain sentence on standard error."""
    notes().print(Text.assemble(("error: ", "bold red"), sentence), soft_wrap=True)


def bytes_text(size: float) -> str:
    """1536 -> '1.5 KiB'; a KiB is 1024 bytes."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"
