"""Running one step of `tools/gpu_check`: its processes, their logs and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.tasks import Task

ROOT = Path(__file__).resolve().parents[2]
BENCH = (sys.executable, "-m", "zsmerge_compile.cli", "bench", "--device", "cuda")
PYTEST = (sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider")
TRITON = "tests/ops/triton"  # compiled where there is a GPU, marked for one or not; elsewhere interpreted
SHARES = max(1, min(6, (os.cpu_count() or 1) // 2))  # processes that share them out: compiling is most of their time
IMPORTS = 10.0  # seconds before a bench looks at its clock


def commands(task: Task, out: Path, seconds: float) -> dict[str, list[str]]:
    """What the step runs side by side, by the log's name; a bench ends itself within `seconds` where it can."""
    if task.arguments:
        minutes = f"{max(1.0, seconds - IMPORTS) / 60:.3f}"
        results = ["--append", "--missing", "--out", str(out / "gpu_check.json"), "--minutes", minutes]
        return {"gpu_check.log": [*BENCH, *task.arguments, *results]}
    marked = [*PYTEST, "-m", "gpu", f"--ignore={TRITON}", "tests"]
    shares = {
        f"gpu_tests_triton_{share}.log": [
            *(*PYTEST, "-p", "benchmarks.shard", "--shard", f"{share}/{SHARES}"),
            *("-m", "not slow", TRITON),
        ]
        for share in range(1, SHARES + 1)
    }
    return {"gpu_tests.log": marked, **shares}


def run(task: Task, out: Path, seconds: float) -> str:
    """Run one step to its end or its limit; what became of it, of the worst of its processes where it has several."""
    started = time.monotonic()
    with ExitStack() as held:
        processes = []
        for name, command in commands(task, out, seconds).items():
            log = held.enter_context((out / name).open("a"))
            log.write(f"\n=== {task.name}\n")
            log.flush()
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            held.callback(stop, process)
            processes.append(process)
        ended = [_end(process, started + seconds - time.monotonic()) for process in processes]
    worst = next((how for how in ended if how != "done"), "done")
    return f"{worst}, {time.monotonic() - started:.0f} s"


def _end(process: subprocess.Popen[bytes], seconds: float) -> str:
    try:
        code = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return "stopped at its time limit"
    return "done" if code == 0 else f"ended with status {code}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and every process it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def told_by_tests(out: Path) -> str:
    """The last line of every log of the tests."""
    logs = sorted(out.glob("gpu_tests*.log"))
    lines = (path.read_text(errors="replace").strip().splitlines() for path in logs)
    return "; ".join(found[-1].strip("= ") for found in lines if found)
