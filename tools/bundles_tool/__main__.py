"""`tools/bundles`: what each format of bundle costs, beside the model compiled in the process.

The shipped LLaMA, 256 slots, batch 1, fp32, one thread. Steps are medians, in turn, but those of the C++ runner, whose
process times itself afterwards. Writes tools/results/bundles.json and prints it as a table.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import zsmerge_compile as zs
from cpp_runner.build import build
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


class Dynamo:
    """The model under torch.compile, called as a runner is."""

    def __init__(self, model: nn.Module, config: zs.ZSMergeConfig) -> None:
        self.cache = zs.new_cache(model, config)
        self.run = torch.compile(model, backend="zsmerge", options={"config": config, "cache": self.cache})
        self.reset = self.cache.reset

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        positions = self.cache.seen_tokens[:, None] + torch.arange(ids.shape[1])
        return self.run(ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1]

    decode = prefill


def cpp_runner(folder: Path, ids: Tensor, steps: int) -> dict[str, float]:
    """What `zsmerge-run` says of its times: the median of several processes."""
    prompt = ",".join(map(str, ids[0].tolist()))
    command, single = [build(), folder, str(steps + 1), prompt], {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [subprocess.run(command, env=single, capture_output=True, text=True, check=True) for _ in range(7)]
    told = [[float(number) for number in re.findall(r"([\d.e+-]+) ms", run.stderr)] for run in runs]
    prompts, tokens = (statistics.median(column) for column in zip(*told, strict=True))
    return {"prompt_ms": round(prompts, 1), "token_ms": round(tokens, 2)}


def main() -> None:
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(ASSETS).eval()
    config = zs.ZSMergeConfig(BUDGET)
    runners: dict[str, Any] = {"compiled": zs.compile(model, config), "torch.compile": Dynamo(model, config)}
    eager = zs.compile(model, config, backend="eager")
    rows: dict[str, dict[str, float]] = {name: {} for name in runners}
    with tempfile.TemporaryDirectory() as scratch:
        for name in (name for name in FORMATS if name != "tensorrt"):  # that needs a GPU
            exporting, folder = seconds(lambda name=name: zs.export(eager, Path(scratch) / name, name))
            loading, runners[name] = seconds(lambda folder=folder: zs.load(folder))
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            rows[name] = {"bytes": size, "export_s": round(exporting, 1), "load_s": round(loading, 2)}
        ids = torch.randint(10, 800, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        token = torch.tensor([[7]])
        for name, runner in runners.items():
            runner.prefill(ids)  # warm
            runner.decode(token)
            runner.reset()
            rows[name]["prompt_ms"] = round(1e3 * seconds(lambda runner=runner: runner.prefill(ids))[0], 1)
        blocks: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(BLOCKS):
            for name, runner in runners.items():
                taken, _ = seconds(lambda runner=runner: [runner.decode(token) for _ in range(STEPS)])
                blocks[name].append(1e3 * taken / STEPS)
        for name, block in blocks.items():
            rows[name]["token_ms"] = round(statistics.median(block), 2)
        rows["aoti, C++ runner"] = cpp_runner(Path(scratch) / "aoti", ids, BLOCKS * STEPS)
    told = {"command": "tools/bundles", **environment(), "budget": BUDGET, "prompt tokens": PROMPT, "rows": rows}
    OUT.write_text(json.dumps(told, indent=1) + "\n")
    table = Table("format", "MiB", "export s", "load s", "prompt ms", "ms per token")
    for name, row in rows.items():
        size = f"{row['bytes'] / 2**20:.1f}" if "bytes" in row else ""
        table.add_row(name, size, *(str(row.get(key, "")) for key in ("export_s", "load_s", "prompt_ms", "token_ms")))
    Console().print(table)


if __name__ == "__main__":
    main()
