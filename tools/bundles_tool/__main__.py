"""`tools/bundles`: what each format of bundle costs, beside the model compiled in the process.

The shipped LLaMA, 256 slots, batch 1, fp32, one thread. Steps are medians, the formats in turn. Writes
tools/results/bundles.json and prints it as a table.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import zsmerge_compile as zs
from training.publish import environment
from training.train import ROOT
from zsmerge_compile.bundles.export import FORMATS
from zsmerge_compile.cli.demo import ASSETS

OUT = ROOT / "tools" / "results" / "bundles.json"
BUDGET, PROMPT, BLOCKS, STEPS = 256, 400, 60, 4


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def main() -> None:
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(ASSETS).eval()
    config = zs.ZSMergeConfig(BUDGET)
    runners: dict[str, Any] = {"compiled": zs.compile(model, config)}
    eager, rows = zs.compile(model, config, backend="eager"), {"compiled": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name in FORMATS:
            exporting, folder = seconds(lambda name=name: zs.export(eager, Path(scratch) / name, name))
            loading, runners[name] = seconds(lambda folder=folder: zs.load(folder))
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            rows[name] = {"bytes": size, "export_s": round(exporting, 1), "load_s": round(loading, 2)}
        ids = torch.randint(10, 800, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        token = torch.tensor([[7]])
        for name, runner in runners.items():
            runner.prefill(ids)  # warm
            runner.reset()
            rows[name]["prompt_ms"] = round(1e3 * seconds(lambda runner=runner: runner.prefill(ids))[0], 1)
        blocks: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(BLOCKS):
            for name, runner in runners.items():
                taken, _ = seconds(lambda runner=runner: [runner.decode(token) for _ in range(STEPS)])
                blocks[name].append(1e3 * taken / STEPS)
        for name, block in blocks.items():
            rows[name]["token_ms"] = round(statistics.median(block), 2)
    told = {"command": "tools/bundles", **environment(), "budget": BUDGET, "prompt tokens": PROMPT, "rows": rows}
    OUT.write_text(json.dumps(told, indent=1) + "\n")
    table = Table("format", "MiB", "export s", "load s", "prompt ms", "ms per token")
    for name, row in rows.items():
        size = f"{row['bytes'] / 2**20:.1f}" if "bytes" in row else ""
        table.add_row(name, size, *(str(row.get(key, "")) for key in ("export_s", "load_s", "prompt_ms", "token_ms")))
    Console().print(table)


if __name__ == "__main__":
    main()
