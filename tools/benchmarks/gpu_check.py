"""The GPU's tests, then the benchmarks in order of worth, each in processes of its own with a time limit.

A hang, a crash or too little memory loses one step only; figures are written after every row, so a cut-off loses
little, and --keep goes on from there. A step that is expected not to end in time makes way for the next that will.
Results: gpu_check.json, .txt and .png, and logs, under $OUT if set, else tools/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.steps import ROOT, run, told_by_tests
from benchmarks.tasks import MINUTES, SUITES, TASKS, Task, limit

NEEDED = ("torch", "transformers", "safetensors", "numpy", "rich", "pytest", "hypothesis")
PROBE = (  # in a process of its own: this one holds no GPU memory
    "import json, torch; from zsmerge_compile.bench.machine import conditions; "
    "print(json.dumps(conditions(torch.device('cuda'))))"
)


def lacking() -> str | None:
    """In one sentence what this machine lacks, or None."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"python3 must have {', '.join(NEEDED)}, got one without {', '.join(absent)}"
    import torch

    if not torch.cuda.is_available():
        return f"this machine must have a GPU that torch can use, got torch {torch.__version__} with none"
    return None


def blank(out: Path) -> None:
    """The results file with every row marked 'not measured'."""
    from zsmerge_compile.cli import main as cli

    target = str(out / "gpu_check.json")
    if cli(["bench", "--device", "cuda", "--blank", "--suite", *SUITES, "--out", target]):
        raise SystemExit(2)


def summary(out: Path) -> None:
    """Print the ratios; render the tables once more, as a stopped step wrote its last figures as JSON only."""
    from rich.console import Console

    from zsmerge_compile.bench.command import write
    from zsmerge_compile.bench.ratios import ratios
    from zsmerge_compile.bench.records import load
    from zsmerge_compile.bench.report import ratios_table

    results = load(out / "gpu_check.json")
    write(results)
    Console(width=150, highlight=False).print(ratios_table(ratios(results.records, results.runs)))
    print(f"all rows: {results.path.with_suffix('.txt')}")


def check(options: argparse.Namespace) -> bool:
    """Run the steps there is time for; whether all that were started ended well."""
    from benchmarks.estimates import TESTS, Machine, seconds_left
    from zsmerge_compile.bench import machine, runs
    from zsmerge_compile.bench.records import load

    deadline = time.monotonic() + 60 * options.minutes
    prepare(options)
    probe = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found = json.loads(probe.stdout)
    here = Machine(runs.machine(found), machine.usable(found["memory_bytes"]))
    told = []
    for task in TASKS:
        if options.steps and task.name not in options.steps:
            continue
        asked = options.steps and not task.arguments  # nothing tells whether tests have run whole
        expected = TESTS if asked else seconds_left(task, load(options.out / "gpu_check.json"), here)
        told.append(step(task, options, expected, deadline - time.monotonic()))
        print(f"{task.name}: {told[-1]}", flush=True)
    summary(options.out)
    return all(text.startswith(("done", "not started", "nothing")) for text in told)


def prepare(options: argparse.Namespace) -> None:
    """Results to add to: those that are there, which raises InputError if they cannot be read, or blank ones."""
    from zsmerge_compile.bench.records import load

    options.out.mkdir(parents=True, exist_ok=True)
    if options.keep and (options.out / "gpu_check.json").exists():
        load(options.out / "gpu_check.json")
        return
    for log in (*options.out.glob("gpu_tests*.log"), options.out / "gpu_check.log"):
        log.unlink(missing_ok=True)
    blank(options.out)


def step(task: Task, options: argparse.Namespace, expected: float, left: float) -> str:
    """Run one step if it has something to do and the time for it; what became of it."""
    if not expected:
        return "nothing left to do"
    if left < expected:
        return f"not started: about {expected:.0f} s needed, {max(0.0, left):.0f} s left"
    allowed = min(left, limit(expected, options.minutes))
    print(f"{task.name}: about {expected:.0f} s, at most {allowed:.0f} s", flush=True)
    ended = run(task, options.out, allowed)
    return ended if task.arguments else f"{ended}; {told_by_tests(options.out)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0 where every step that was started ended well, 1 where one did not, 2 where the machine won't do."""
    options = _options(arguments)
    if options.blank:
        options.out.mkdir(parents=True, exist_ok=True)
        blank(options.out)
        return 0
    lack = lacking()
    if lack is None:
        from zsmerge_compile.errors import InputError

        try:
            return 0 if check(options) else 1
        except InputError as error:
            lack = str(error)
    print(f"error: {lack}", file=sys.stderr)
    return 2


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [task.name for task in TASKS]
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  tools/gpu_check\n  tools/gpu_check --keep --minutes 40    # what is left\n"
        "  tools/gpu_check --steps op-16k figure3 --minutes 6",
    )
    parser.add_argument("--minutes", type=_minutes, default=MINUTES, metavar="M", help=f"for everything ({MINUTES:g})")
    parser.add_argument("--steps", choices=names, nargs="+", metavar="STEP", help=", ".join(names))
    default = Path(os.environ.get("OUT") or ROOT / "tools" / "results")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="results ($OUT, or tools/results)")
    parser.add_argument("--blank", action="store_true", help="only write the table, every row 'not measured'")
    text = "keep what is there and measure only what this machine hasn't; the tests only if `--steps tests` asks"
    parser.add_argument("--keep", action="store_true", help=text)
    return parser.parse_args(arguments)


def _minutes(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"minutes must be a number above 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
