"""`zsmerge-compile demo`: the model that comes with the package, over a full cache and over compressed ones."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsmerge_compile.cli.checkpoint import load_model, load_tokenizer
from zsmerge_compile.cli.console import add_backend, add_command, bytes_text, console, count, notes
from zsmerge_compile.errors import InputError, must

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from zsmerge_compile.cli.comparison import Material, Outcome

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "llama-stdlib"
SHARES = (0.20, 0.10, 0.05)
_EXAMPLES = """  zsmerge-compile demo
  zsmerge-compile demo --prompt-tokens 1500 --new-tokens 100
  zsmerge-compile demo --backend eager        # no compiler needed
"""


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        "continue a source file by full cache, and by 20%, 10% and 5% of it",
        "The model and the file, one it never saw in training, come with the package.",
        _EXAMPLES,
    )
    parser.add_argument("--prompt-tokens", type=count, default=1024, metavar="N", help="from the start (1024)")
    parser.add_argument("--truth-tokens", type=count, default=256, metavar="N", help="after those, for the loss (256)")
    parser.add_argument("--new-tokens", type=count, default=64, metavar="N", help="tokens each method writes (64)")
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="CPU threads (1: the model is small)")
    add_backend(parser, "inductor")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> int:
    import torch

    out = console()
    torch.set_num_threads(options.threads)
    with notes().status("loading"):
        model, tokenizer = load_model(ASSETS, "float32"), load_tokenizer(ASSETS)
        text = (ASSETS / "held_out.txt").read_text(encoding="utf-8")
        material = cut(tokenizer, text, options.prompt_tokens, options.truth_tokens, options.new_tokens)
    outcomes = compare(model, material, SHARES, options.backend)
    out.print(figures(outcomes))
    out.print(conditions(model, material, options.backend), style="dim")
    out.print()
    out.print(texts(tokenizer, material, outcomes, out))
    return 0


def cut(tokenizer: Any, text: str, prompt: int, truth: int, new_tokens: int) -> Material:
    """The whole lines in the first `prompt` tokens, and the `truth` tokens after; InputError where there are fewer."""
    from zsmerge_compile.cli.comparison import Material

    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if truth < 2 or ids.shape[1] < prompt + truth:
        expected = f"at most {ids.shape[1]:,} with at least 2 of truth, the length of the held-out file"
        raise InputError(must("--prompt-tokens and --truth-tokens together", expected, f"{prompt:,} + {truth:,}"))
    starts = (at for at in range(prompt, 0, -1) if tokenizer.decode(ids[0, at : at + 1]).startswith("\n"))
    end = next(starts, prompt)
    return Material(ids[:, :end], ids[:, end : end + truth], new_tokens)


def compare(model: Any, material: Material, shares: Sequence[float], backend: str) -> list[Outcome]:
    """The full cache first, then one compiled model per share; progress on standard error."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from zsmerge_compile.cli import comparison

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes(), transient=True) as progress:
        task = progress.add_task("", total=len(shares))
        methods = [comparison.full_cache(model)]
        for share in shares:
            progress.update(task, description=f"compiling for a budget of {share:.0%}")
            methods.append(comparison.compressed(model, material, share, backend))
            progress.advance(task)
        task = progress.add_task("running all of them", total=material.truth.shape[1] - 1 + len(methods))
        return comparison.compare(methods, material, lambda: progress.advance(task))


def figures(outcomes: Sequence[Outcome]) -> RenderableType:
    from rich.table import Table

    table = Table(title="a source file held out of training, continued by each method", title_justify="left")
    table.add_column("method")
    for column in ("slots", "held-out loss", "cache", "of full", "ms per token", "first use"):
        table.add_column(column, justify="right")
    for row in outcomes:
        share = row.cache_bytes / outcomes[0].cache_bytes
        warm = f"{row.warm_seconds:.1f} s" if row.warm_seconds else "-"
        size, speed = bytes_text(row.cache_bytes), f"{row.ms_per_token:.2f}"
        table.add_row(row.method, f"{row.slots:,}", f"{row.loss:.3f}", size, f"{share:.0%}", speed, warm)
    return table


def conditions(model: Any, material: Material, backend: str) -> str:
    """What the figures hold for."""
    import torch

    prompt, truth = material.prompt.shape[1], material.truth.shape[1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"Loss in nats per token over the {truth:,} tokens that follow a prompt of {prompt:,}; slots are per key/value "
        f"head; ms per token is the median of those steps, methods in turn, batch 1, {parameters:,} parameters, "
        f"{str(model.dtype).split('.')[-1]}, CPU threads: {torch.get_num_threads()}, {platform.machine()}. Full cache: "
        f"transformers {version('transformers')} with DynamicCache; budgets: backend {backend}, torch "
        f"{torch.__version__}; first use: compiling and the first prompt and step."
    )


def texts(tokenizer: Any, material: Material, outcomes: Sequence[Outcome], out: Console) -> RenderableType:
    """What follows in the file and what each method writes, side by side as far as the width allows."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    truth = material.truth[0, : material.new_tokens].tolist()
    written = {"the file goes on": truth} | {row.method: row.written for row in outcomes}
    panels = []
    for name, ids in written.items():
        text = Text(tokenizer.decode(ids, skip_special_tokens=True).strip("\n"), overflow="fold")
        panels.append(Panel(text, title=name, title_align="left"))
    abreast = max(1, min(len(panels), out.width // 45))
    grid = Table.grid(expand=True)
    for _ in range(abreast):
        grid.add_column(ratio=1)
    for start in range(0, len(panels), abreast):
        grid.add_row(*panels[start : start + abreast])
    return grid
