"""Builds TensorRT engines for tiny and 7B-shaped models of the three families, compares and times them.

Each model's step is compared with the reference for 200 steps, logits and state, its bundle is written and read again
(tiny models), and it is timed beside Inductor's. Every model has a process to itself, so that what breaks one leaves
the others. Results: tensorrt_check.json, under $OUT if set, else in tools/results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TINY = ("llama-gqa", "mistral-w8", "falcon-7b", "falcon-rw")
LARGE = ("llama-2-7b", "mistral-7b", "falcon-7b")
PACKAGES = ("torch", "triton", "transformers", "torch_tensorrt", "tensorrt", "onnx", "onnxscript")
MARK = "tensorrt_check: "  # begins the line with a case's facts


class Case(NamedTuple):
    """A model: "tiny-" and its name in tests/models_zoo.py, or that of a shape in zsmerge_compile/bench."""

    name: str
    dtype: str
    budget: int
    batch: int


CASES = (
    *(Case(f"tiny-{name}", dtype, 24, 3) for name in TINY for dtype in ("float32", "float16", "bfloat16")),
    *(Case(name, "bfloat16", 1024, 1) for name in LARGE),
)


def model_of(case: Case, layers: int | None) -> Any:
    import torch

    dtype = getattr(torch, case.dtype)
    if case.name.startswith("tiny-"):
        from tests.models_zoo import tiny

        return tiny(case.name.removeprefix("tiny-"), dtype).cuda()
    from zsmerge_compile.bench.shapes import named

    return named(case.name, layers).build("cuda", dtype)


def check(case: Case, steps: int, layers: int | None) -> dict[str, Any]:
    """What came of one model; raises whatever goes wrong with TensorRT."""
    import torch

    import zsmerge_compile as zs
    from tensorrt_tool.compare import compare, timed

    model, config = model_of(case, layers), zs.ZSMergeConfig(case.budget)
    ours = zs.compile(model, config, case.batch, "tensorrt")
    reference = zs.compile(model, config, case.batch, "eager")
    told: dict[str, Any] = {"kernels": ours.report.kernels, "compile_s": {"tensorrt": ours.report.compile_seconds}}
    sides = {"tensorrt": ours}
    try:
        sides["inductor"] = zs.compile(model, config, case.batch, "inductor")
        told["compile_s"]["inductor"] = sides["inductor"].report.compile_seconds
    except Exception:  # TensorRT is what is asked about; it is then compared and timed alone
        told["inductor_failed"] = traceback.format_exc()
    generator = torch.Generator().manual_seed(0)
    length = case.budget // 2 if case.name.startswith("tiny-") else 3 * case.budget // 2  # steps fill tiny caches
    prompt = torch.randint(10, 100, (case.batch, length), generator=generator).cuda()
    told |= {"cache_bytes": ours.cache.nbytes, "layers": len(ours.report.layouts)}
    told |= compare(ours, reference, sides.get("inductor"), prompt, steps)
    if case.name.startswith("tiny-"):
        told["bundle_good"] = bundle_is_good(ours, prompt)
    told["ms_per_token"] = timed(sides, prompt)
    free, total = torch.cuda.mem_get_info()
    return told | {"device_bytes": total - free, "torch_peak_bytes": torch.cuda.max_memory_allocated()}


def bundle_is_good(ours: Any, prompt: Any) -> bool:
    """Whether the bundle written and read again generates the same tokens."""
    import torch

    import zsmerge_compile as zs

    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with tempfile.TemporaryDirectory() as folder:
        loaded = zs.load(zs.export(ours, Path(folder) / "bundle", "tensorrt"))
        return torch.equal(loaded.generate(prompt, **options), ours.generate(prompt, **options))


def alone(case: Case, steps: int, layers: int | None) -> dict[str, Any]:
    """`check` in a process of its own: its facts, or how it failed."""
    given = ["--one", f"{case.name}:{case.dtype}", "--steps", str(steps)]
    given += [] if layers is None else ["--layers", str(layers)]
    command = [sys.executable, "-m", "tensorrt_tool", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode == 0 and len(lines) == 1:
        facts: dict[str, Any] = json.loads(lines[0])
        return facts
    return {"good": False, "failed": f"status {done.returncode}", "log": (done.stdout + done.stderr)[-20_000:]}


def results(chosen: Sequence[Case], steps: int, layers: int | None, write: Any) -> bool:
    """Every case in turn, written after each; whether all were good."""
    import torch

    from zsmerge_compile.bench.machine import conditions

    told: dict[str, Any] = {"conditions": conditions(torch.device("cuda")), "versions": versions(), "cases": []}
    for case in chosen:
        started = time.perf_counter()
        facts = alone(case, steps, layers)
        facts["seconds"] = round(time.perf_counter() - started, 1)
        told["cases"].append({**case._asdict(), **facts})
        write(told)
        shown = facts.get("failed") or f"good: {facts['good']}, ms per token {facts['ms_per_token']}"
        print(f"{case.name} {case.dtype}: {shown}", flush=True)
    return all(case["good"] and case.get("bundle_good", True) for case in told["cases"])


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0 where every model was good, 1 where one was not, 2 where this machine cannot build engines."""
    options = _options(arguments)
    try:
        from zsmerge_compile.lower import tensorrt_needs
    except ImportError as error:
        hint = 'pip install -e ".[tensorrt]"'
        print(f"error: python3 must have torch and transformers, got {error}; {hint}", file=sys.stderr)
        return 2
    lack = tensorrt_needs.missing()
    if lack is not None:
        print(f"error: {lack}", file=sys.stderr)
        return 2
    if options.one is not None:
        (case,) = (case for case in CASES if f"{case.name}:{case.dtype}" == options.one)
        print(MARK + json.dumps(check(case, options.steps, options.layers), default=str))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "tensorrt_check.json"
    chosen = [case for case in CASES if not options.models or case.name in options.models]

    def write(told: dict[str, Any]) -> None:
        path.write_text(json.dumps(told, indent=1, default=str) + "\n")

    good = results(chosen, options.steps, options.layers, write)
    print(path)
    return 0 if good else 1


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/tensorrt_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="7B-shaped models hold their weights twice on the GPU (27 GB), and once more while an engine is built;\n"
        "--layers makes them smaller.\n\n"
        "examples:\n  tools/tensorrt_check\n  tools/tensorrt_check --models tiny-llama-gqa --steps 50\n"
        "  tools/tensorrt_check --models llama-2-7b --layers 4",
    )
    names = list(dict.fromkeys(case.name for case in CASES))
    parser.add_argument("--models", choices=names, nargs="+", metavar="NAME", help=", ".join(names))
    parser.add_argument("--steps", type=_count, default=200, metavar="N", help="compared with the reference (200)")
    parser.add_argument("--layers", type=_count, default=None, metavar="N", help="of 7B-shaped models (as released)")
    default = Path(os.environ.get("OUT") or ROOT / "tools" / "results")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="results ($OUT, or tools/results)")
    parser.add_argument("--one", choices=[f"{case.name}:{case.dtype}" for case in CASES], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
