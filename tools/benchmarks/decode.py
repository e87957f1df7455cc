"""Decode milliseconds per token on the CPU: ours against transformers' DynamicCache and plain static attention.

One model (random weights, at least 100 M parameters), one process, steps interleaved. Caches are filled with random
content instead of being prefilled ("seen" and "held" are set, not reached): a step's time depends on how many tokens
are held, not on which.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import zsmerge_compile as zs
from benchmarks.conditions import conditions, copy_bandwidth, interleaved
from benchmarks.plain import PLAIN, fill
from zsmerge_compile.lower import inductor
from zsmerge_compile.lower.expand import expand

RESULTS = Path(__file__).resolve().parent.parent / "results"


def model_100m(layers: int, dtype: torch.dtype) -> Any:
    """A LLaMA of GQA shape: hidden 768, 12 query and 4 key/value heads of 64; 12 layers make 125 M parameters."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def dynamic_cache_step(model: Any, tokens: int) -> Callable[[], object]:
    """One transformers decode step at `tokens` held; the token it adds is taken back, so every step is alike."""
    config, cache = model.config, DynamicCache(config=model.config)
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
        cache.update(torch.randn(shape, dtype=model.dtype), torch.randn(shape, dtype=model.dtype), layer)
    ids = torch.zeros(1, 1, dtype=torch.int64)

    @torch.no_grad()
    def step() -> None:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def zsmerge_step(compiled: Any, tokens: int) -> Callable[[], object]:
    """One `CompiledModel.decode`, checks and bookkeeping included, over a full cache at `tokens` seen."""
    ids, seen = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([tokens])

    def step() -> None:
        compiled.cache.seen_tokens.copy_(seen)
        compiled.decode(ids)
        seen.add_(1)

    return step


def plain_step(compiled: Any) -> Callable[[], object]:
    """The same graph with plain static attention over as many slots, in a state of its own."""
    program = compiled.program
    inputs, states = inductor.decode_inputs(program), program.allocate()
    decode = inductor.compile_graph(expand(program.decode, program.policy.decode_op, PLAIN, inputs), inputs)
    flat = [tensor for state in states for tensor in state]
    ids, seen, active = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0]), torch.ones(1, dtype=torch.bool)
    for state in states:
        fill(state)

    @torch.no_grad()
    def step() -> None:
        decode(ids, seen, active, *flat)
        seen.add_(1)

    return step


def measure(budgets: list[int], contexts: list[int], layers: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """All rows of the table."""
    model = model_100m(layers, dtype)
    steps: dict[str, Callable[[], object]] = {}
    info: dict[str, dict[str, object]] = {}
    for budget in budgets:
        compiled = zs.compile(model, zs.ZSMergeConfig(budget=budget))
        for layer in range(layers):
            fill(compiled.cache.flat[9 * layer : 9 * layer + 9])
        shape = {"slots": budget + 1, "cache_bytes": compiled.cache.nbytes}
        for tokens in [tokens for tokens in contexts if tokens > budget + 1]:  # before that, the cache is not full
            label = f"zsmerge, {budget + 1} slots, {tokens} seen"
            steps[label] = zsmerge_step(compiled, tokens)
            info[label] = {"kind": "zsmerge", "tokens": tokens, **shape}
        label = f"plain static, {budget + 1} slots"
        steps[label] = plain_step(compiled)
        info[label] = {"kind": "plain", "tokens": budget + 1, **shape}
    for tokens in contexts:
        label = f"transformers DynamicCache, {tokens} held"
        steps[label] = dynamic_cache_step(model, tokens)
        kv = 2 * layers * tokens * model.config.num_key_value_heads * 64 * dtype.itemsize
        info[label] = {"kind": "dynamic", "slots": tokens, "tokens": tokens, "cache_bytes": kv}
    weights = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    bandwidth = copy_bandwidth()
    rows = []
    for label, milliseconds in interleaved(steps, rounds).items():
        held = int(info[label]["cache_bytes"])  # type: ignore[call-overload]
        floor = (weights + held) / bandwidth / 1e6
        rows.append({"row": label, **info[label], "ms": milliseconds, "floor_ms": floor})
    return {
        "conditions": conditions(),
        "model": {"parameters": sum(p.numel() for p in model.parameters()), "layers": layers, "dtype": str(dtype)},
        "batch": 1,
        "rounds": rounds,
        "weight_bytes": weights,
        "copy_gb_per_s": bandwidth,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> Table:
    """The rows as people read them."""
    millions = result["model"]["parameters"] / 1e6
    shown = Table(title=f"decode step, batch 1, {millions:.0f} M parameters, {result['model']['dtype']}")
    for column in ("row", "ms / token", "floor ms", "cache MiB"):
        shown.add_column(column, justify="left" if column == "row" else "right")
    for row in result["rows"]:
        shown.add_row(row["row"], f"{row['ms']:.1f}", f"{row['floor_ms']:.1f}", f"{row['cache_bytes'] / 2**20:.0f}")
    return shown


def write(result: dict[str, Any], path: Path) -> None:
    """The figures as JSON, and beside it the table as text with the conditions they hold for."""
    path.write_text(json.dumps(result, indent=1) + "\n")
    with path.with_suffix(".txt").open("w") as file:
        console = Console(file=file, width=120)
        console.print(table(result))
        for name, value in result["conditions"].items():
            console.print(f"{name}: {value}")


def main() -> None:
    """Command line of tools/bench."""
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: tools/bench --budgets 1023 4095 --contexts 4096 16384 65536",
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[1023], help="slots per key/value head")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536], help="tokens seen")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps per row")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode_cpu.json")
    options = parser.parse_args()
    result = measure(options.budgets, options.contexts, options.layers, getattr(torch, options.dtype), options.rounds)
    Console().print(table(result))
    write(result, options.out)


if __name__ == "__main__":
    main()
