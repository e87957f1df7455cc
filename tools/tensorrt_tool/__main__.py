"""Builds TensorRT engines for tiny and 7B-shaped models of the three families, compares and times them.

Each model's step is compared with the reference for 200 steps, its bundle is written and read again (tiny models), and
it is timed beside Inductor's. Results: tensorrt_check.json, under $OUT if set, else in tools/results.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TINY = ("llama-gqa", "mistral-w8", "falcon-7b", "falcon-rw")
LARGE = ("llama-2-7b", "mistral-7b", "falcon-7b")


class Case(NamedTuple):
    """A model: tiny ones by their name in tests/models_zoo.py, others by that of a shape in zsmerge_compile/bench."""

    name: str
    dtype: str
    tiny: bool
    budget: int
    batch: int


CASES = (
    *(Case(name, dtype, True, 24, 3) for name in TINY for dtype in ("float32", "float16", "bfloat16")),
    *(Case(name, "bfloat16", False, 1024, 1) for name in LARGE),
)


def model_of(case: Case, layers: int | None) -> Any:
    import torch

    dtype = getattr(torch, case.dtype)
    if case.tiny:
        from tests.models_zoo import tiny

        return tiny(case.name, dtype).cuda()
    from zsmerge_compile.bench.shapes import named

    return named(case.name, layers).build("cuda", dtype)


def check(case: Case, steps: int, layers: int | None) -> dict[str, Any]:
    """What came of one model; raises whatever goes wrong."""
    import torch

    import zsmerge_compile as zs
    from tensorrt_tool.compare import compare, timed

    model, config = model_of(case, layers), zs.ZSMergeConfig(case.budget)
    sides = {name: zs.compile(model, config, case.batch, name) for name in ("eager", "inductor", "tensorrt")}
    ours = sides["tensorrt"]
    generator = torch.Generator().manual_seed(0)
    length = case.budget + case.budget // 2
    prompt = torch.randint(10, 100, (case.batch, length), generator=generator).cuda()
    told = {"kernels": ours.report.kernels, "compile_s": {n: s.report.compile_seconds for n, s in sides.items()}}
    told |= {"cache_bytes": ours.cache.nbytes, "layers": len(ours.report.layouts)}
    told |= compare(ours, sides["eager"], sides["inductor"], prompt, steps)
    if case.tiny:
        told["bundle_good"] = bundle_is_good(ours, prompt)
    told["ms_per_token"] = timed({name: sides[name] for name in ("inductor", "tensorrt")}, prompt)
    return told


def bundle_is_good(ours: Any, prompt: Any) -> bool:
    """Whether the bundle written and read again generates the same tokens."""
    import torch

    import zsmerge_compile as zs

    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with tempfile.TemporaryDirectory() as folder:
        loaded = zs.load(zs.export(ours, Path(folder) / "bundle", "tensorrt"))
        return torch.equal(loaded.generate(prompt, **options), ours.generate(prompt, **options))


def results(chosen: Sequence[Case], steps: int, layers: int | None, write: Any) -> bool:
    """Every case in turn, written after each; whether all were good."""
    import torch

    from zsmerge_compile.bench.machine import conditions

    told: dict[str, Any] = {"conditions": conditions(torch.device("cuda")), "cases": []}
    for case, facts in outcomes(chosen, steps, layers):
        told["cases"].append({**case._asdict(), **facts})
        write(told)
        shown = facts.get("failed") or f"good: {facts['good']}, ms per token {facts['ms_per_token']}"
        print(f"{case.name} {case.dtype}: {shown}", flush=True)
    return all(case.get("good") and case.get("bundle_good", True) for case in told["cases"])


def outcomes(chosen: Sequence[Case], steps: int, layers: int | None) -> Iterator[tuple[Case, dict[str, Any]]]:
    import torch

    for case in chosen:
        started = time.perf_counter()
        try:
            facts = check(case, steps, layers)
        except Exception as error:  # one model's failure is a result; the others are still asked
            facts = {"good": False, "failed": f"{type(error).__name__}: {error}"}
        yield case, facts | {"seconds": round(time.perf_counter() - started, 1)}
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0 where every model was good, 1 where one was not, 2 where this machine cannot build engines."""
    options = _options(arguments)
    try:
        from zsmerge_compile.lower import tensorrt_needs
    except ImportError as error:
        print(f"error: python3 must have torch and transformers, got {error}", file=sys.stderr)
        return 2
    lack = tensorrt_needs.missing()
    if lack is not None:
        print(f"error: {lack}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "tensorrt_check.json"
    chosen = [case for case in CASES if not options.models or case.name in options.models]

    def write(told: dict[str, Any]) -> None:
        path.write_text(json.dumps(told, indent=1, default=str) + "\n")

    good = results(chosen, options.steps, options.layers, write)
    print(path)
    return 0 if good else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/tensorrt_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  tools/tensorrt_check\n  tools/tensorrt_check --models llama-gqa --steps 50\n"
        "  tools/tensorrt_check --models llama-2-7b --layers 4",
    )
    names = sorted({case.name for case in CASES})
    parser.add_argument("--models", choices=names, nargs="+", metavar="NAME", help=", ".join(names))
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="compared with the reference (200)")
    parser.add_argument("--layers", type=int, default=None, metavar="N", help="of 7B-shaped models (as released)")
    default = Path(os.environ.get("OUT") or ROOT / "tools" / "results")
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="results ($OUT, or tools/results)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
