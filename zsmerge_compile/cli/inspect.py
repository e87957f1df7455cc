"""`zsmerge-compile inspect`: what the passes find in a model, and the cache they lay out for it."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsmerge_compile.cli.checkpoint import DTYPES, is_bundle, load_model
from zsmerge_compile.cli.console import BUDGET_HELP, Budget, add_command, budget, bytes_text, console, count, notes
from zsmerge_compile.cli.policy import add_policy
from zsmerge_compile.errors import InputError, must

if TYPE_CHECKING:
    from rich.table import Table

    from zsmerge_compile import CompiledModel
    from zsmerge_compile.runtime.report import Report

_EXAMPLES = """  zsmerge-compile inspect ~/models/Llama-3.2-1B
  zsmerge-compile inspect bundle/
  zsmerge-compile inspect ~/models/Mistral-7B-v0.1 --budget 2048 --batch-size 8
  zsmerge-compile inspect ~/models/Llama-3.2-1B --policy pyramidkv:window=32 --budget 1024
  zsmerge-compile inspect ~/models/falcon-rw-1b --graphs graphs/     # then: diff graphs/decode/00_* graphs/decode/01_*
"""


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        "show the attention sites found in a checkpoint, per-pass counts, and the cache's layout and bytes",
        "Nothing is run.",
        _EXAMPLES,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="directory with config.json and weights, or a bundle")
    parser.add_argument("--budget", type=budget, default=Budget(slots=1024), metavar="N", help=BUDGET_HELP)
    add_policy(parser)
    parser.add_argument("--length", type=count, default=4096, metavar="N", help="tokens of the full cache shown (4096)")
    parser.add_argument("--batch-size", type=count, default=1, metavar="N", help="rows of the cache (1)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of weights and cache (auto: as saved)")
    parser.add_argument("--graphs", type=Path, metavar="DIR", help="write the graphs, before and after each pass")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> int:
    if options.graphs is not None and options.graphs.exists() and not options.graphs.is_dir():
        raise InputError(must("--graphs", "a directory", f"{options.graphs}, which is a file"))
    if is_bundle(options.path):
        for table in bundle_tables(options.path):
            console().print(table)
        return 0
    import zsmerge_compile as zs

    policy = options.policy.make(options.budget.of(options.length))
    with notes().status("loading"):
        model = load_model(options.path, options.dtype)
    with notes().status("tracing and rewriting"), _dumping(options.graphs):
        compiled = zs.compile(model, policy, batch_size=options.batch_size, backend="eager")
    out, report = console(), compiled.report
    seconds = f"{report.compile_seconds:.1f} s to trace and rewrite"
    out.print(f"{report.model}: {len(report.sites)} attention sites, {seconds}; cache policy {options.policy.text}")
    for table in (sites_table(report), passes_table(report), cache_table(compiled, options.length)):
        out.print(table)
    if options.graphs is not None:
        out.print(f"graphs: {options.graphs}/prefill and {options.graphs}/decode, one file before and after each pass")
    return 0


def bundle_tables(path: Path) -> Iterator[Table]:
    """What the manifest of a bundle says, after its files were checked."""
    from zsmerge_compile.bundles import manifest

    told = manifest.read(path)
    facts = _table(f"bundle {path}", "what", "value")
    facts.add_row("format, version", f"{told.format}, {told.version}")
    policy = {"name": told.policy.get("name"), **told.policy.get("config", {})}
    for name, values in (("versions", told.versions), ("model", told.model), ("policy", policy)):
        facts.add_row(name, ", ".join(f"{key} {value}" for key, value in values.items()))
    cache = told.cache
    facts.add_row("cache", f"{cache['batch_size']} rows, {cache['dtype']}, {cache['device']}")
    facts.add_row("prompts", "whole" if told.chunk is None else f"chunks of {told.chunk}")
    yield facts
    state = _table("state, inputs and outputs of both graphs", "layers", "tensor", "shape", "dtype")
    kinds: list[tuple[str, ...]] = [
        tuple("\n".join(str(field[place]) for field in layer) for place in range(3)) for layer in cache["layers"]
    ]
    for layers, kind in _runs(kinds):
        state.add_row(layers, *kind)
    yield state
    files = _table("files", "name", "bytes", "sha256")
    for name, fact in told.files.items():
        files.add_row(name, bytes_text(fact["bytes"]), fact["sha256"][:16])
    yield files


@contextmanager
def _dumping(folder: Path | None) -> Iterator[None]:
    """The passes write their graphs to the directory that ZSMERGE_DUMP names."""
    if folder is None:
        yield
        return
    before = os.environ.get("ZSMERGE_DUMP")
    os.environ["ZSMERGE_DUMP"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["ZSMERGE_DUMP"]
        else:
            os.environ["ZSMERGE_DUMP"] = before


def sites_table(report: Report) -> Table:
    """One line per attention; neighbouring layers that differ in their number only share one."""
    table = _table("attention sites", "layers", "mask", "query heads", "key/value heads", "head dim", "source")
    kinds: list[tuple[str, ...]] = [
        (_mask(site), str(site.heads), str(site.kv_heads), str(site.head_dim), _place(site.source))
        for site in report.sites
    ]
    for layers, kind in _runs(kinds):
        table.add_row(layers, *kind)
    return table


def passes_table(report: Report) -> Table:
    graphs = list(report.passes)
    table = _table("rewrites", "pass", *graphs)
    for name in dict.fromkeys(name for graph in graphs for name in report.passes[graph]):
        table.add_row(name, *(str(report.passes[graph].get(name, "")) for graph in graphs))
    return table


def cache_table(compiled: CompiledModel, length: int) -> Table:
    """Slots and bytes by layer, and in all; a full cache holds `length` tokens, or a layer's window of them."""
    title = f"cache, {compiled.batch_size} row{'s' * (compiled.batch_size > 1)}, {str(compiled.dtype).split('.')[-1]}"
    names = ("layers", "proximity", "context", "residual", "slots", "bytes", f"full cache, {length:,} tokens")
    table = _table(title, *names)
    kinds: list[tuple[str, ...]] = []
    full_sizes = []
    for layout, state in zip(compiled.report.layouts, compiled.cache.layers, strict=True):
        tokens = length if layout.window is None else min(length, layout.window)
        full = 2 * tokens * layout.kv_heads * layout.head_dim * compiled.dtype.itemsize * compiled.batch_size
        size = sum(tensor.nbytes for tensor in vars(state).values())
        parts = (layout.proximity, layout.context, layout.residual, layout.slots)
        kinds.append((*(f"{part:,}" for part in parts), bytes_text(size), bytes_text(full)))
        full_sizes.append(full)
    for layers, kind in _runs(kinds):
        table.add_row(layers, *kind)
    table.add_section()
    table.add_row("all", "", "", "", "", bytes_text(compiled.cache.nbytes), bytes_text(sum(full_sizes)))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _mask(site: Any) -> str:
    if site.slopes is not None:
        return "ALiBi"
    return "causal" if site.window is None else f"sliding window of {site.window:,}"


def _place(source: str) -> str:
    """`node (model.layers.3.self_attn, /lib/x.py:7: code)` -> `model.layers.N.self_attn, x.py:7`.

    The layer's number stands in a column of its own.
    """
    found = re.search(r"\((?P<module>[\w.]+), (?:\S*[/\\])?(?P<line>\S+:\d+)", source)
    if found is None:
        return source
    module = ".".join("N" if part.isdecimal() else part for part in found["module"].split("."))
    return f"{module}, {found['line']}"


def _runs(kinds: list[tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Equal neighbours together: ("0-31", kind)."""
    start = 0
    for layer, kind in enumerate(kinds):
        if layer + 1 == len(kinds) or kinds[layer + 1] != kind:
            yield (str(layer) if start == layer else f"{start}-{layer}"), kind
            start = layer + 1
