"""Whether the kernels that a benchmark times compute what the specification says; no speed-up is told where not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zsmerge_compile.bench.fill import fill
from zsmerge_compile.bench.machine import free_memory
from zsmerge_compile.bench.seam import compile_alone, kernel_of
from zsmerge_compile.ops import contracts, reference
from zsmerge_compile.ops.state import LayerLayout, State, allocate
from zsmerge_compile.program import Program
from zsmerge_compile.testing.tolerance import OP_FP32

STEPS = 3
HALF = 2e-2  # bf16, fp16: an output's error as a share of its norm; the reference works in fp32 on the same inputs
SCORE_HALF = 1e-3
LARGEST = 2**28  # elements of the keys that the reference widens to fp32, and no more than a share of what is free:
FREE = 1 / 40  # else the check shrinks the batch, then the slots
PROMPT = 160  # tokens of the prompt that checks the other op


@dataclass(frozen=True)
class Verdict:
    """`ok`, and in words what was compared or what differs."""

    ok: bool
    text: str


def check_decode(program: Program, steps: int = STEPS) -> Verdict:
    """The program's decode kernel, compiled by itself, against `ops.reference` from the same full state.

    Device, dtype, heads and slots are the program's (fewer rows, then slots, where the reference would need too much
    memory). Every step starts from the reference's state, so that one difference is seen once.
    """
    batch, layout = _size(program)
    kernel = kernel_of(program, contracts.DECODE)
    constants = program.policy.decode_arguments(program.sites[0], layout, None)
    rule = contracts.rule_of(*constants)
    ours = allocate(layout, batch, program.dtype, program.device)
    seen = torch.full((batch,), layout.slots * 3 + 1, device=program.device)
    fill(ours, layout.proximity, int(seen[0]))
    active = torch.ones(batch, dtype=torch.bool, device=program.device)
    tokens = _random(program, batch, layout, 1)
    run = compile_alone(kernel, (*tokens, *ours, seen, active), constants)
    what = f"{kernel.name}: {steps} steps, {batch} rows, {layout.slots:,} slots, {_name(program.dtype)}"
    for step in range(steps):
        tokens = _random(program, batch, layout, 1, seed=step + 1)
        pads = torch.zeros_like(seen)
        with torch.no_grad():
            expected, after = reference.extend(State(*ours), *tokens, seen, pads, rule)
        got = run(*tokens, *ours, seen, active)
        wrong = _difference(got, expected, program.dtype) or _state_difference(ours, after, program.dtype)
        if wrong:
            return Verdict(False, f"{what}: step {step}, {wrong}")
        for buffer, content in zip(ours, after, strict=True):
            buffer.copy_(content)
        seen = seen + 1
    return Verdict(True, f"{what}: as ops.reference")


def check_extend(program: Program) -> Verdict:
    """The same of a prompt on an empty cache, about half of which has to be merged."""
    layout = _cut(program.layouts[0], PROMPT // 2)
    kernel = kernel_of(program, contracts.EXTEND)
    constants = program.policy.extend_arguments(program.sites[0], layout, None)
    state = allocate(layout, 1, program.dtype, program.device)
    row = torch.zeros(1, dtype=torch.int64, device=program.device)
    tokens = _random(program, 1, layout, PROMPT)
    what = f"{kernel.name}: a prompt of {PROMPT} tokens, {layout.slots} slots, {_name(program.dtype)}"
    with torch.no_grad():
        expected, after = reference.extend(State(*state), *tokens, row, row, contracts.rule_of(*constants))
        got = kernel.run(*tokens, *state, row, row.clone(), row.clone(), *constants)
    wrong = _difference(got, expected, program.dtype)
    if not wrong and program.dtype == torch.float32:  # in half precision near-equal scores decide who is merged
        wrong = _state_difference(state, after, program.dtype)
    if not wrong and not torch.equal(state.weight.sum(2), after.weight.sum(2)):
        wrong = "the weights' sums differ"
    return Verdict(not wrong, f"{what}: {wrong or 'as ops.reference'}")


def _size(program: Program) -> tuple[int, LayerLayout]:
    layout = program.layouts[0]
    row = layout.kv_heads * layout.head_dim
    largest = min(LARGEST, int(free_memory(program.device) * FREE))
    slots = min(layout.slots, max(64, largest // row))
    return max(1, min(program.batch_size, largest // (row * slots))), _cut(layout, slots - 1)


def _cut(layout: LayerLayout, budget: int) -> LayerLayout:
    """The layout at `budget` slots or fewer, its parts in proportion."""
    if budget >= layout.budget:
        return layout
    proximity = max(1, layout.proximity * budget // layout.budget)
    residual = max(min(1, layout.residual), layout.residual * budget // layout.budget)
    context = max(0, budget - proximity - residual)
    return LayerLayout(layout.heads, layout.kv_heads, layout.head_dim, proximity, context, residual, layout.window)


def _random(
    program: Program, batch: int, layout: LayerLayout, tokens: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """query [B, H, n, D], key and value [B, G, n, D]."""
    random = torch.Generator(device=program.device).manual_seed(1000 + seed)

    def draw(heads: int) -> Tensor:
        shape = (batch, heads, tokens, layout.head_dim)
        return torch.randn(shape, generator=random, dtype=program.dtype, device=program.device)

    return draw(layout.heads), draw(layout.kv_heads), draw(layout.kv_heads)


def _difference(got: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """In words, or empty. NaN differs."""
    error = (got.float() - expected.float()).abs()
    if dtype == torch.float32:
        good = bool((error <= OP_FP32 * (1 + expected.abs())).all())
        return "" if good else f"outputs differ by {float(error.max()):.1e}, allowed {OP_FP32:.0e}"
    share = float(error.norm() / expected.float().norm())
    return "" if share <= HALF else f"outputs differ by {share:.1e} of their norm, allowed {HALF:.0e}"


def _state_difference(ours: State, theirs: State, dtype: torch.dtype) -> str:
    """The first field that differs in live slots, whatever slots the two use; in words, or empty."""
    half = dtype != torch.float32
    mine, other = _ordered(ours), _ordered(theirs)
    for name, ours_part in mine.items():
        theirs_part = other[name]
        error = (ours_part.double() - theirs_part.double()).abs()
        allowed = 0.0 if name == "position" else OP_FP32
        if half and name in ("score", "key", "value"):
            allowed = SCORE_HALF if name == "score" else HALF
        if not bool((error <= allowed * (1 + theirs_part.double().abs())).all()):
            return f"{name} of the cache differs in {int((error > allowed).sum())} places, by {float(error.max()):.1e}"
    return ""


def _ordered(state: State) -> dict[str, Tensor]:
    """Live content in an order of its own: single tokens by position, residual slots as opened; zeros elsewhere."""
    singles = state.weight.shape[2] - state.opened.shape[2]
    live, late = state.weight > 0, torch.iinfo(torch.int32).max
    alive, merged = live[:, :, :singles], live[:, :, singles:]
    rank = torch.where(alive, state.position[:, :, :singles], late).argsort(-1)
    found = {}
    for name in ("position", "weight", "score", "key", "value"):
        found[name] = _take(getattr(state, name)[:, :, :singles], alive, rank)
    rank = torch.where(merged, state.opened, late).argsort(-1)
    parts = {name: getattr(state, name)[:, :, singles:] for name in ("position", "weight", "score", "key", "value")}
    parts |= {"masters of keys": state.residual_key, "masters of values": state.residual_value}
    parts |= {"mean position": state.residual_position}
    for name, part in parts.items():
        residual = _take(part, merged, rank)
        found[name] = torch.cat([found[name], residual], 2) if name in found else residual
    return found


def _take(part: Tensor, live: Tensor, rank: Tensor) -> Tensor:
    alive = live if part.dim() == 3 else live[..., None]
    index = rank if part.dim() == 3 else rank[..., None].expand(part.shape)
    return torch.where(alive, part, torch.zeros_like(part)).gather(2, index)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
