"""Whether the kernels that a benchmark times compute what the specification says; no speed-up is told where not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zsmerge_compile.bench.decided import prompts
from zsmerge_compile.bench.differences import HALF, of_outputs, of_states
from zsmerge_compile.bench.fill import fill
from zsmerge_compile.bench.machine import free_memory
from zsmerge_compile.bench.seam import compile_alone, kernel_of, rule_alone
from zsmerge_compile.ops import contracts, reference
from zsmerge_compile.ops.state import LayerLayout, State, allocate
from zsmerge_compile.program import Program

STEPS = 3
LARGEST = 2**28  # elements of the keys that the reference widens to fp32, and no more than a share of what is free:
FREE = 1 / 40  # else the check shrinks the batch, then the slots
PROMPTS = (160, 64)  # tokens of the two prompts that check the other op, the second on a filled cache


@dataclass(frozen=True)
class Verdict:
    """`ok`, and in words what was compared or what differs; not `checked`: there is nothing to compare with."""

    ok: bool
    text: str
    checked: bool = True

    @property
    def word(self) -> str:
        """As records have it."""
        return ("green" if self.ok else "red") if self.checked else "not checked"


def check_decode(program: Program, steps: int = STEPS) -> Verdict:
    """The program's decode kernel, compiled by itself, against `ops.reference` from the same full state.

    Device, dtype, heads and slots are the program's (fewer rows, then slots, where the reference would need too much
    memory). Every step starts from the reference's state, so that one difference is seen once. A policy with an op of
    its own has no specification in `ops.reference`, which the verdict then says.
    """
    if program.policy.decode_op is not contracts.DECODE or program.policy.state_fields != State._fields:
        return Verdict(True, f"not checked: the op of {program.policy.name} is none of ops.reference", checked=False)
    batch, layout = _size(program)
    kernel = kernel_of(program, contracts.DECODE)
    rule = rule_alone(program, layout)
    constants = contracts.spelled(rule)
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
            expected, after = reference.extend(State(*ours), *tokens, seen, pads, rule, decoded=True)
        got = run(*tokens, *ours, seen, active)
        wrong = of_outputs(got, expected, program.dtype) or of_states(ours, after, program.dtype)
        if wrong:
            return Verdict(False, f"{what}: step {step}, {wrong}")
        for buffer, content in zip(ours, after, strict=True):
            buffer.copy_(content)
        seen = seen + 1
    return Verdict(True, f"{what}: as ops.reference")


def check_extend(program: Program) -> Verdict:
    """The same of a prompt on an empty cache, most of which has to be merged, then of one on the cache it left."""
    layout = _cut(program.layouts[0], PROMPTS[0] // 2)
    kernel = kernel_of(program, contracts.EXTEND)
    rule = rule_alone(program, layout)
    constants = contracts.spelled(rule)
    state = allocate(layout, 1, program.dtype, program.device)
    row, seen = (torch.zeros(1, dtype=torch.int64, device=program.device) for _ in range(2))
    what = f"{kernel.name}: {PROMPTS[0]} and {PROMPTS[1]} tokens, {layout.slots} slots, {_name(program.dtype)}"
    for tokens in prompts(layout, rule.scale, PROMPTS, program.dtype, program.device):
        with torch.no_grad():
            expected, after = reference.extend(State(*state), *tokens, seen, row, rule)
            got = kernel.run(*tokens, *state, row, seen.clone(), row.clone(), *constants)
        wrong = of_outputs(got, expected, program.dtype) or of_states(state, after, program.dtype, HALF)
        if wrong:
            cache = "a filled" if int(seen) else "an empty"
            return Verdict(False, f"{what}: on {cache} cache {wrong}")
        for buffer, content in zip(state, after, strict=True):
            buffer.copy_(content)
        seen += tokens.key.shape[2]
    return Verdict(True, f"{what}: as ops.reference")


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
