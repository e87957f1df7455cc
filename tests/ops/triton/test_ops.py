"""The registered ops, what they refuse, how a grid is planned, and that the kernels fit real GPUs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from zsmerge_compile.ops import contracts
from zsmerge_compile.ops.state import LayerLayout, Rule, allocate
from zsmerge_compile.ops.triton import blocks
from zsmerge_compile.ops.triton.supports import supports

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

from zsmerge_compile.ops.triton import ops  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUT = LayerLayout(heads=4, kv_heads=2, head_dim=16, proximity=11, context=10, residual=3)
RULE = Rule(LAYOUT.proximity, LAYOUT.context, 0.6, 0.98, 0.25)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=DEVICE)
ALIBI = replace(RULE, window=64, slopes=SLOPES, alibi_divisor=4.0, alibi_bf16=True)


def arguments(n: int, rule: Rule) -> tuple[Any, ...]:
    state = allocate(LAYOUT, 2, torch.float32, DEVICE)
    q, k, v = (torch.randn(2, heads, n, LAYOUT.head_dim, device=DEVICE) for heads in (4, 2, 2))
    seen = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    if n == 1:
        return q, k, v, *state, seen, torch.tensor([True, False], device=DEVICE), *contracts.spelled(rule)
    rows, pads = torch.tensor([[0, 1], [0, 3]], device=DEVICE)
    return q, k, v, *state, rows, seen, pads, *contracts.spelled(rule)


@pytest.mark.parametrize("rule", [RULE, ALIBI], ids=["causal", "alibi-window"])
@pytest.mark.parametrize(("op", "n"), [(ops.DECODE, 1), (ops.EXTEND, 20)], ids=["decode", "extend"])
def test_opcheck(op: Any, n: int, rule: Rule) -> None:
    torch.library.opcheck(op, arguments(n, rule))


@pytest.mark.parametrize(("op", "like"), [(ops.DECODE, contracts.DECODE), (ops.EXTEND, contracts.EXTEND)])
def test_schema_is_the_contract(op: Any, like: Any) -> None:
    assert str(op._schema).partition("(")[2] == str(like._schema).partition("(")[2]


@pytest.mark.parametrize(
    ("run", "op", "n"), [(ops.decode_step, contracts.DECODE, 1), (ops.extend, contracts.EXTEND, 20)]
)
def test_same_as_the_contract_op(run: Any, op: Any, n: int) -> None:
    given = arguments(n, RULE)
    other = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in given)
    torch.testing.assert_close(run(*given)[0], op(*other)[0], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(given[contracts.STATE_AT], other[contracts.STATE_AT], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_inputs_may_be_views() -> None:
    """Queries, keys and values as a fused projection leaves them: one buffer, heads behind columns."""
    for n, run in ((1, ops.decode_step), (20, ops.extend)):
        given = arguments(n, RULE)
        fused = torch.cat([t.transpose(1, 2).flatten(2) for t in given[:3]], 2)
        views = [part.unflatten(2, (-1, LAYOUT.head_dim)).transpose(1, 2) for part in fused.split([64, 32, 32], 2)]
        state = [t.clone() for t in given[contracts.STATE_AT]]
        expected = run(*given)
        torch.testing.assert_close(run(*views, *state, *given[12:]), expected, atol=0, rtol=0)
        for ours, theirs in zip(state, given[contracts.STATE_AT], strict=True):
            assert torch.equal(ours, theirs)


def test_a_state_that_is_not_contiguous_is_refused() -> None:
    given = list(arguments(1, RULE))
    given[3] = given[3].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="the cache's key must be contiguous, got strides"):
        ops.decode_step(*given)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((torch.bfloat16, 128, 32, 8, (9, 0)), None),
        ((torch.float16, 64, 71, 1), None),
        ((torch.float64, 128, 32, 8), "dtype torch.float64 is none of"),
        ((torch.float32, 320, 8, 8), "head dim 320 is above 256"),
        ((torch.float32, 64, 7, 2), "7 query heads cannot share 2"),
        ((torch.float32, 64, 256, 1), "256 query heads for each"),
        ((torch.float16, 128, 32, 8, (7, 5)), "compute capability 7.5 is below 8.0"),
    ],
)
def test_supports(shape: tuple[Any, ...], reason: str | None) -> None:
    found = supports(*shape)
    assert found is None if reason is None else found is not None and found.startswith(reason)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("dim", "group"), [(64, 71), (128, 1), (128, 4), (80, 3), (256, 8)])
@pytest.mark.parametrize("slots", [1, 17, 1025, 16_385, 1_000_001])
@pytest.mark.parametrize("pairs", [1, 8, 512])
def test_a_plan_covers_every_slot_and_head_within_the_grids_limits(
    itemsize: int, dim: int, group: int, slots: int, pairs: int
) -> None:
    plan = blocks.plan(blocks.rule(itemsize, dim, group), pairs, slots, group, 132)
    assert plan.chunk % plan.blocks.block == 0
    assert (plan.splits - 1) * plan.chunk < slots <= plan.splits * plan.chunk
    assert plan.splits <= blocks.MOST_SPLITS
    assert slots <= plan.tiles * plan.blocks.tile
    assert plan.tiles <= 65_535
    assert plan.blocks.tile >= 32 * plan.blocks.finish_warps  # a slot for each thread: none is held twice


def test_import_of_supports_and_blocks_needs_no_triton() -> None:
    code = (
        "import sys, zsmerge_compile.ops.triton.blocks, zsmerge_compile.ops.triton.supports\n"
        "print('triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_kernels_compile_for_real_gpus_without_one(tmp_path: Path) -> None:
    """Every kernel, in a fresh process (here they may be interpreted); `tools/kernels aot` does all shapes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / "tools"), str(ROOT), environment.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "kernels_tool", "aot", "--out", str(tmp_path), "--dtype", "bf16"]
    command += ["--model", "LLaMA-3-8B"]
    run = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads((tmp_path / "triton_aot.json").read_text(encoding="utf-8"))["variants"]
    kernels = ("split", "finish", "rows", "columns", "segments", "absorb means", "absorb single", "gather")
    assert {(row["kernel"], row["arch"]) for row in found} == set(itertools.product(kernels, ("sm_80", "sm_90")))
    split = [row for row in found if row["kernel"] == "split"]
    assert all(row["wide_loads"] > 0 for row in split), "K and V must be read 16 bytes at a time"
