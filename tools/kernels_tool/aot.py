"""Compile every kernel variant for sm_80 and sm_90 with no GPU, and check that it fits a multiprocessor.

Too much shared memory and spilled registers are no errors to the compiler, so this looks.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kernels_tool.compiling import Launch, compile_for, needs
from kernels_tool.shapes import SHAPES
from kernels_tool.variants import DTYPES, launches
from zsmerge_compile.ops.triton.blocks import SHARED_MEMORY

PROCESSORS = {80: 108, 90: 132}  # A100, H100: they set the grid, and with it a few constants of the finish kernel
MOST_SPILLS = 64  # instructions that move registers to memory and back; the table gives each variant's


def run(options: argparse.Namespace) -> int:
    """Compile, print and write the table; 1 if a variant takes too much shared memory or spills too much."""
    console = Console(stderr=True)
    jobs = [
        (model, dtype, arch)
        for model in options.model or SHAPES
        for dtype in options.dtype or DTYPES
        for arch in options.arch or PROCESSORS
    ]
    done: dict[str, dict[str, Any]] = {}
    rows = [row for job in track(jobs, "compiling", console=console) for row in _rows(*job, options.kernel, done)]
    if not rows:
        console.print("no variant is compiled for what was asked: nothing is written", style="red")
        return 1
    report = {
        "conditions": {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "command": "tools/kernels " + " ".join(sys.argv[1:]),
            "gpu": "none: compiled ahead of time, not run",
            "limits": {"shared_memory_kib": {f"sm_{a}": SHARED_MEMORY[a] for a in PROCESSORS}, "spills": MOST_SPILLS},
        },
        "variants": rows,
    }
    _write(report, options.out)
    wrong = [row for row in rows if not row["fits"]]
    for row in wrong:
        console.print(f"does not fit: {row}", style="red", soft_wrap=True)
    console.print(f"{len(rows)} variants, {len(wrong)} do not fit; {options.out / 'triton_aot.txt'}", soft_wrap=True)
    return 1 if wrong else 0


def _rows(
    model: str, dtype: str, arch: int, kernels: list[str] | None, done: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """What one shape's kernels need; `done` remembers kernels that other shapes use, too."""
    rows: dict[str, dict[str, Any]] = {}
    for launch in launches(SHAPES[model], DTYPES[dtype], PROCESSORS[arch]):
        name = _name(launch)
        if kernels and name.split()[0] not in kernels:
            continue
        compiled = compile_for(launch, arch)
        if compiled.hash not in done:
            done[compiled.hash] = needs(compiled)._asdict()
        found = done[compiled.hash]
        fits = found["shared"] <= SHARED_MEMORY[arch] * 1024 and found["spills"] <= MOST_SPILLS
        rows[name] = dict(model=model, dtype=dtype, arch=f"sm_{arch}", kernel=name, **found, fits=fits)
    return list(rows.values())


def _name(launch: Launch) -> str:
    """The kernel's name, and for the merge kernel which rule it serves."""
    name = launch.kernel.__name__.removesuffix("_kernel")
    return f"{name} {'single' if launch.keywords['SINGLE'] else 'means'}" if name == "absorb" else name


def _write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "triton_aot.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"Triton {triton.__version__}: what each kernel needs (compiled ahead of time, not run)")
    columns = ("model", "dtype", "arch", "kernel", "registers", "shared", "spills", "wide_loads", "tensor_cores")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:4] else "right")
    for row in report["variants"]:
        table.add_row(*(str(row[column]) for column in columns))
    with (folder / "triton_aot.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(table)
