"""Time the decode kernels over block sizes on this GPU, and write the table that `ops/triton/blocks.py` reads.

The prefill kernels are not swept: their blocks are the rule's.

For every shape the caches are full and larger than the L2 cache together, as they are in a model: a step's time is
that of a CUDA graph of steps over many layers' caches, divided by their number. A candidate is timed only if one step
agrees with the reference. Entries of shapes that were not asked for are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from torch import Tensor

from kernels_tool.shapes import SHAPES, Shape
from kernels_tool.variants import DTYPES, layer
from zsmerge_compile.ops import reference
from zsmerge_compile.ops.state import Rule, State
from zsmerge_compile.ops.triton import blocks, launch_decode
from zsmerge_compile.runtime.graphs import cuda_recorder

DEVICE = "cuda"
WORKING_SET = 2**28  # bytes of K and V that a timed graph goes through: five times an H100's L2 cache
ROUNDS = 7


class Layers(NamedTuple):
    """Full caches of many alike layers, and one token for each."""

    states: list[State]
    tokens: tuple[Tensor, Tensor, Tensor]  # query, key, value
    seen: Tensor
    active: Tensor
    rule: Rule


def run(options: argparse.Namespace) -> int:
    """Sweep, print each shape's best, write the table."""
    console = Console(stderr=True)
    if not torch.cuda.is_available():
        console.print("tune must be run on a CUDA device, got none; `tools/kernels aot` needs none", style="red")
        return 1
    target = options.out or blocks.TABLE
    arch, processors = launch_decode.device_facts(torch.cuda.current_device())
    failed = False
    for model, name in itertools.product(options.model or SHAPES, options.dtype or DTYPES):
        shape, dtype = SHAPES[model], DTYPES[name]
        key = blocks.shape_key(dtype.itemsize, shape.head_dim, shape.heads // shape.kv_heads, arch)
        sizes = list(itertools.product(options.slots, options.batch))
        times = sweep(shape, dtype, sizes, processors, console)
        best = best_of(times)
        if best is None:
            console.print(f"{model} {name}: {key}: no blocks gave the reference's result at every size", style="red")
            failed = True
            continue
        report = {"sizes": told(shape, dtype, sizes, times, best), "candidates": len(times)}
        console.print(f"{model} {name}: {key}: {best}\n{json.dumps(report, indent=1)}", soft_wrap=True)
        write_entry(target, key, best, report | conditions())
    return 1 if failed else 0


def write_entry(target: Path, key: str, best: blocks.DecodeBlocks, measured: dict[str, Any]) -> None:
    """One shape's entry, in place of an earlier one; the others stay."""
    table = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    table.setdefault("decode", {})[key] = asdict(best)
    table.setdefault("measured", {})[key] = measured
    target.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def conditions() -> dict[str, str]:
    """Hardware, versions and command line."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "command": "tools/kernels " + " ".join(sys.argv[1:]),
    }


def candidates(itemsize: int, head_dim: int, group: int) -> Iterator[blocks.DecodeBlocks]:
    """The rule's blocks first, then one or two of their numbers changed."""
    start = blocks.rule(itemsize, head_dim, group)
    yield start
    for block, warps, stages in itertools.product((32, 64, 128), (4, 8), (1, 2, 3, 4)):
        yield replace(start, block=block, warps=warps, stages=stages)
    for branch, programs in itertools.product((False, True), (1, 2, 4, 8)):
        yield replace(start, branch=branch, programs=programs)
    for tile, warps in itertools.product((128, 256, 512, 1024), (4, 8)):
        if tile >= 32 * warps:
            yield replace(start, tile=tile, finish_warps=warps)


Times = dict[blocks.DecodeBlocks, list[float]]  # milliseconds at each size; infinite where the result is wrong


def sweep(shape: Shape, dtype: torch.dtype, sizes: list[tuple[int, int]], processors: int, console: Console) -> Times:
    """Every candidate at every size (slots, batch), the rule's first."""
    group = shape.heads // shape.kv_heads
    found = dict.fromkeys(candidates(dtype.itemsize, shape.head_dim, group))
    times: Times = {candidate: [] for candidate in found}
    for slots, batch in sizes:
        layers = full_layers(shape, dtype, slots, batch)
        for candidate in found:
            plan = blocks.plan(candidate, batch * shape.kv_heads, slots + 1, group, processors)
            milliseconds = float("inf")
            try:
                if agrees(layers, plan):
                    milliseconds = time_graph(layers, plan)
            except triton.runtime.errors.OutOfResources as error:
                console.print(f"{candidate}: {error}", style="yellow", soft_wrap=True)
            times[candidate].append(milliseconds)
        del layers
        torch.cuda.empty_cache()
    return times


def best_of(times: Times) -> blocks.DecodeBlocks | None:
    """The least mean of (time / the best time at that size) over all sizes; None where none was right at each."""
    least = [min(column) for column in zip(*times.values(), strict=True)]
    right = [candidate for candidate, row in times.items() if all(math.isfinite(t) for t in row)]
    return min(right, key=lambda c: statistics.mean(t / b for t, b in zip(times[c], least, strict=True)), default=None)


def told(
    shape: Shape, dtype: torch.dtype, sizes: list[tuple[int, int]], times: Times, best: blocks.DecodeBlocks
) -> dict[str, dict[str, float | None]]:
    """For each size: the rule's time (None where it does not fit or is wrong) and the best's, and its GB/s."""
    rule = next(iter(times.values()))
    one = 2 * shape.kv_heads * shape.head_dim * dtype.itemsize  # bytes of a slot's keys and values
    return {
        f"{slots} slots, batch {batch}": {
            "rule_ms": rule_ms if math.isfinite(rule_ms) else None,
            "best_ms": best_ms,
            "best_gb_per_s": batch * slots * one / best_ms / 1e6,
        }
        for (slots, batch), rule_ms, best_ms in zip(sizes, rule, times[best], strict=True)
    }


def full_layers(shape: Shape, dtype: torch.dtype, slots: int, batch: int) -> Layers:
    """Caches as they are once full: all slots but the next ring slot are held, residual ones by several tokens."""
    one = 2 * batch * shape.kv_heads * (slots + 1) * shape.head_dim * dtype.itemsize
    states = []
    for _ in range(max(2, -(-WORKING_SET // one))):
        state, rule = layer(shape, dtype, slots, batch, DEVICE)
        first = slots + 1 - state.opened.shape[2]
        state.key.normal_()
        state.value.normal_()
        state.residual_key.copy_(state.key[:, :, first:])
        state.residual_value.copy_(state.value[:, :, first:])
        state.weight.fill_(1.0)
        state.weight[:, :, first:] = 5.0
        state.score.uniform_()
        state.opened.copy_(torch.arange(1, state.opened.shape[2] + 1, device=DEVICE))
        ring = rule.proximity + 1
        at = -(-4 * slots // ring) * ring  # the new token takes ring slot 0
        state.position[:, :, 1:ring] = at - torch.arange(rule.proximity, 0, -1, device=DEVICE, dtype=torch.int32)
        state.position[:, :, ring:] = torch.arange(slots + 1 - ring, device=DEVICE, dtype=torch.int32)
        state.weight[:, :, 0] = 0.0
        states.append(state)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    query, key, value = (torch.randn(batch, h, 1, shape.head_dim, device=DEVICE).to(dtype) for h in heads)
    seen = torch.full((batch,), at, dtype=torch.int64, device=DEVICE)
    active = torch.ones(batch, dtype=torch.bool, device=DEVICE)
    return Layers(states, (query, key, value), seen, active, rule)


def agrees(layers: Layers, plan: blocks.DecodePlan) -> bool:
    """Whether one step gives the reference's output and weights (decided scores may differ by rounding in half)."""
    state = State(*(t[:1].clone() for t in layers.states[0]))
    tokens = [t[:1] for t in layers.tokens]
    expected, after = reference.extend(state, *tokens, layers.seen[:1], (~layers.active[:1]).long(), layers.rule)
    out = launch_decode.decode(state, *tokens, layers.seen[:1], layers.active[:1], layers.rule, plan)
    tolerance = 1e-4 if out.dtype == torch.float32 else 3e-2
    same = torch.allclose(out, expected, atol=tolerance, rtol=tolerance)
    return same and torch.equal(state.weight.sum(2), after.weight.sum(2))


def time_graph(layers: Layers, plan: blocks.DecodePlan) -> float:
    """Median milliseconds of one layer's step, within a CUDA graph of a step of every layer."""

    def steps() -> Tensor:
        for state in layers.states:
            out = launch_decode.decode(state, *layers.tokens, layers.seen, layers.active, layers.rule, plan)
        return out

    return median_ms(cuda_recorder(layers.seen.device)(steps).replay) / len(layers.states)


def median_ms(replay: Callable[[], object]) -> float:
    times = []
    for turn in range(ROUNDS + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)
