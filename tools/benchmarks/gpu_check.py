"""The GPU's tests, then the benchmarks in order of worth, each in a process of its own with a time limit.

A hang, a crash or too little memory loses one step only; figures are written after every row, so a cut-off loses
little. Results: gpu_check.json, .txt and .png, and the tests' log, under $OUT if set, else tools/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "transformers", "safetensors", "numpy", "rich", "pytest", "hypothesis")
BENCH = (sys.executable, "-m", "zsmerge_compile.cli", "bench", "--device", "cuda")
SPARE = 15.0  # seconds below which no step is started


@dataclass(frozen=True)
class Task:
    """One step: `arguments` of `zsmerge-compile bench`, or none for the tests; `limit` in seconds."""

    name: str
    limit: float
    arguments: tuple[str, ...] = ()


def _bench(name: str, limit: float, text: str) -> Task:
    return Task(name, limit, tuple(text.split()))


TASKS = (
    Task("tests", 180),
    _bench("op", 90, "--suite op"),
    _bench("figure3", 180, "--suite figure3"),
    _bench("slots-16k", 120, "--suite slots --budgets 16383 --batches 16 1"),
    _bench("generate", 60, "--suite generate"),
    _bench("flat", 60, "--suite flat"),
    _bench("prefill", 90, "--suite prefill"),
    _bench("table1", 150, "--suite table1"),
    _bench("slots", 120, "--suite slots --budgets 4095 1023"),
    _bench("decode", 180, "--suite decode --contexts 4096 16384 55296"),
    _bench("families", 90, "--suite families"),
    _bench("table1-static", 180, "--suite table1-static"),
    _bench("decode-128k", 120, "--suite decode --contexts 131072"),
    _bench("compile", 180, "--suite compile"),
)


def missing() -> str | None:
    """In one sentence what this machine lacks, or None."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"python3 must have {', '.join(NEEDED)}, got one without {', '.join(absent)}"
    import torch

    if not torch.cuda.is_available():
        return f"this machine must have a GPU that torch can use, got torch {torch.__version__} with none"
    return None


def command(task: Task, out: Path, left: float) -> list[str]:
    """What the step runs, ending itself within `left` seconds where it can."""
    if not task.arguments:
        return [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--maxfail=20", "-p", "no:cacheprovider", "tests"]
    minutes = str(round(min(left, task.limit) / 60, 2))
    return [*BENCH, *task.arguments, "--append", "--out", str(out / "gpu_check.json"), "--minutes", minutes]


def blank(out: Path) -> None:
    """The results file with every row marked 'not measured'."""
    suites = dict.fromkeys(task.arguments[1] for task in TASKS if task.arguments)
    subprocess.run([*BENCH, "--blank", "--suite", *suites, "--out", str(out / "gpu_check.json")], cwd=ROOT, check=True)


def run(task: Task, out: Path, left: float) -> str:
    """Run one step to its end or its limit; what became of it."""
    started = time.monotonic()
    with (out / ("gpu_check.log" if task.arguments else "gpu_tests.log")).open("a") as log:
        log.write(f"\n=== {task.name}\n")
        log.flush()
        process = subprocess.Popen(
            command(task, out, left), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(min(left, task.limit))
            ended = "done" if code == 0 else f"ended with status {code}"
        except subprocess.TimeoutExpired:
            ended = "stopped at its time limit"
        finally:
            stop(process)
    return f"{ended}, {time.monotonic() - started:.0f} s"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a step and every process it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else ""


def summary(out: Path) -> None:
    """Print the ratios; render the tables once more, as a stopped step wrote its last figures as JSON only."""
    from rich.console import Console

    from zsmerge_compile.bench.command import write
    from zsmerge_compile.bench.ratios import ratios
    from zsmerge_compile.bench.records import load
    from zsmerge_compile.bench.report import ratios_table

    results = load(out / "gpu_check.json")
    write(results)
    Console(width=150, highlight=False).print(ratios_table(ratios(results.records)))
    print(f"all rows: {results.path.with_suffix('.txt')}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0 where every step that was started ended well, 1 where one did not, 2 where the machine won't do."""
    names = [task.name for task in TASKS]
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: tools/gpu_check --steps op figure3 --minutes 6",
    )
    parser.add_argument("--minutes", type=float, default=9.0, metavar="M", help="for everything (9)")
    parser.add_argument("--steps", choices=names, nargs="+", default=names, metavar="STEP", help=", ".join(names))
    default = Path(os.environ.get("OUT") or ROOT / "tools" / "results")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="results ($OUT, or tools/results)")
    parser.add_argument("--blank", action="store_true", help="only write the table, every row 'not measured'")
    parser.add_argument("--keep", action="store_true", help="add to the results that are there (of the same machine)")
    options = parser.parse_args(arguments)
    if options.blank:
        options.out.mkdir(parents=True, exist_ok=True)
        blank(options.out)
        return 0
    lack = missing()
    if lack:
        print(f"error: {lack}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.keep:
        for name in ("gpu_check.log", "gpu_tests.log"):
            (options.out / name).unlink(missing_ok=True)
        blank(options.out)
    told, bad = [], False
    for task in (task for name in options.steps for task in TASKS if task.name == name):
        left = deadline - time.monotonic()
        if left < SPARE:
            told.append(f"{task.name}: not started, no time left")
            print(told[-1])
            continue
        print(f"{task.name}: at most {min(left, task.limit):.0f} s", flush=True)
        ended = run(task, options.out, left)
        bad |= not ended.startswith("done")
        tests = f"; {last_line(options.out / 'gpu_tests.log')}" if not task.arguments else ""
        told.append(f"{task.name}: {ended}{tests}")
        print(told[-1], flush=True)
    summary(options.out)
    print(*told, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
