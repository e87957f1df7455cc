"""The command behind `tools/bench` and `zsmerge-compile bench`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from zsmerge_compile.bench import machine, plots, report
from zsmerge_compile.bench.plan import listing, missing, planned, unmeasured
from zsmerge_compile.bench.records import FAILED, Results, red
from zsmerge_compile.bench.rows import Group
from zsmerge_compile.bench.session import Session
from zsmerge_compile.cli.console import console, notes
from zsmerge_compile.errors import InputError, must

OURS = ("zsmerge", "prompt-full", "prompt-chunked", "loop", "generate", "op", "compile", "policy")


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 where an op check is red or a row of ours failed."""
    started = time.monotonic()
    device = find_device(options.device, there=not options.blank)
    groups = planned(options, device)
    if not options.list:
        check_out(options.out)
    if options.blank:
        write(Results(options.out, [], unmeasured(groups, device)))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    command = " ".join(("zsmerge-compile", *sys.argv[1:]))
    results = Results.open(options.out, command, machine.conditions(device), options.append)
    if options.missing:
        groups = _left(groups, results, device, options)
    if options.list:
        for line in listing(groups, device, machine.usable_memory(device)):
            console().print(line, markup=False, soft_wrap=True)
        return 0
    if not groups:
        notes().print(f"{options.out} has every row that fits this machine", markup=False, soft_wrap=True)
        return 0
    deadline = None if options.minutes is None else started + 60 * options.minutes
    return _measure(groups, results, device, started, deadline)


def _measure(
    groups: list[Group], results: Results, device: torch.device, started: float, deadline: float | None
) -> int:
    said = notes()

    def say(text: str) -> None:
        said.print(f"[{time.monotonic() - started:6.1f} s] {text}", markup=False, soft_wrap=True)

    session = Session(device, results, say, deadline)
    for group in groups:
        session.run(group)
        write(results)
    report.show(results, console())
    said.print(f"written: {results.path} and {write(results)}", markup=False, soft_wrap=True)
    wrong = [r for r in results.records if r.status == FAILED and r.method in OURS]
    return 1 if red(results.records) or wrong else 0


def _left(groups: list[Group], results: Results, device: torch.device, options: argparse.Namespace) -> list[Group]:
    if not options.append:
        raise InputError(must("--missing", "given with --append", "it alone"))
    return missing(groups, results, results.run.machine, device, machine.usable_memory(device))


def write(results: Results) -> str:
    """The JSON, its tables as .txt and its plots as .png beside it; what there is beside the JSON, in words."""
    results.save()
    report.write_text(results, results.path.with_suffix(".txt"))
    if not plots.installed():
        return ".txt; plots need matplotlib"
    return ".txt and .png" if plots.draw(results.records, results.path.with_suffix(".png")) else ".txt; nothing to plot"


def check_out(path: Path) -> None:
    """Raises InputError where results cannot be written there, or tables beside them would overwrite them."""
    if path.suffix != ".json":
        raise InputError(must("--out", "a file whose name ends in .json (tables and plots go beside it)", path))
    if path.is_dir():
        raise InputError(must("--out", "a file", f"the folder {path}"))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(must("--out", "in a folder that can be written to", folder))


def find_device(name: str | None, there: bool = True) -> torch.device:
    """The device asked for, else the GPU where there is one; raises InputError where `there` and it is not."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    text = name or ("cuda" if count else "cpu")
    expected = "cuda (where torch finds one) or cpu"
    try:
        device = torch.device(text)
    except RuntimeError:  # torch's own list of devices is long
        raise InputError(must("--device", expected, name)) from None
    known = device.type == "cpu" or (device.type == "cuda" and (not there or (device.index or 0) < count))
    if not known:
        raise InputError(must("--device", expected, name))
    return device
