"""One decode step or one prompt by the kernels and by `ops.reference`, from the same state, compared slot for slot."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tests.strategies import Case, Tokens, tokens
from zsmerge_compile.ops import reference
from zsmerge_compile.ops.fold import NEVER
from zsmerge_compile.ops.state import State
from zsmerge_compile.ops.triton import launch_decode, launch_extend
from zsmerge_compile.ops.triton.blocks import DecodeBlocks, ExtendBlocks, plan
from zsmerge_compile.testing.tolerance import OP_FP32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = DecodeBlocks(4, 2, 4, 1, False, 3, 8, 4, 2)  # several splits, tiles and residual blocks even for a few slots
SMALL = ExtendBlocks(16, 16, 4, 1, 2)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal outputs: fp32 by the table; in half precision two more roundings of attention weights and outputs."""
    tolerance = {torch.float32: OP_FP32, torch.bfloat16: 2e-2, torch.float16: 4e-3}[ours.dtype]
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def same_states(ours: State, theirs: State, tolerance: float = 1e-4) -> None:
    """The same tokens in the same order, whatever the slots' layout, and residual slots show their masters, rounded.

    As `tests.states.assert_same_states`, for all heads at once: real sizes have a million slots.
    """
    mine, other = in_order(ours), in_order(theirs)
    for name, a, b in zip(mine, mine.values(), other.values(), strict=True):
        allowed = 0 if name in ("weight", "position", "opened") else tolerance
        torch.testing.assert_close(a, b, atol=allowed, rtol=allowed, msg=lambda text, n=name: f"{n}: {text}")
    first = ours.weight.shape[2] - ours.opened.shape[2]
    live = ours.weight[:, :, first:] > 0
    for shown, master in ((ours.key, ours.residual_key), (ours.value, ours.residual_value)):
        assert torch.equal(shown[:, :, first:][live], master[live].to(shown.dtype))


def in_order(state: State) -> dict[str, Tensor]:
    """Single slots by position, then residual slots by their order of opening; dead ones last, as zeros."""
    first = state.weight.shape[2] - state.opened.shape[2]
    live = state.weight > 0
    singles = torch.where(live, state.position, NEVER)[:, :, :first].argsort(dim=2, stable=True)
    residual = torch.where(live[:, :, first:], state.opened, NEVER).argsort(dim=2, stable=True)
    order = torch.cat([singles, residual + first], 2)
    held = live.gather(2, order)
    whole = {
        "weight": state.weight,
        "position": state.position,
        "score": state.score,
        "opened": torch.cat([torch.zeros_like(state.position[:, :, :first]), state.opened], 2),
        "mean": torch.cat([state.position[:, :, :first].float(), state.residual_position], 2),
        "key": torch.cat([state.key[:, :, :first].float(), state.residual_key], 2),
        "value": torch.cat([state.value[:, :, :first].float(), state.residual_value], 2),
    }

    def picked(tensor: Tensor) -> Tensor:
        index, keep = (order, held) if tensor.dim() == 3 else (order[..., None].expand_as(tensor), held[..., None])
        return torch.where(keep, tensor.gather(2, index), 0)

    return {name: picked(tensor) for name, tensor in whole.items()}


def copy(state: State) -> State:
    return State(*(tensor.clone() for tensor in state))


def on_device(case: Case) -> Case:
    slopes = case.rule.slopes
    rule = case.rule if slopes is None else type(case.rule)(**{**vars(case.rule), "slopes": slopes.to(DEVICE)})
    return case._replace(rule=rule)


def draw(
    case: Case, rows: int, n: int, generator: torch.Generator, dtype: torch.dtype, *, alike: bool = False
) -> Tokens:
    """n random tokens for each row; if `alike`, with zero queries and keys: only their values differ."""
    query, key, value = (t.to(DEVICE) for t in tokens(case, rows, n, generator, dtype))
    return Tokens(torch.zeros_like(query), torch.zeros_like(key), value) if alike else Tokens(query, key, value)


def prefilled(
    case: Case, n: int, generator: torch.Generator, dtype: torch.dtype, *, alike: bool = False
) -> tuple[State, Tensor]:
    """The state after up to n tokens (rows differ), by the reference, and the tokens each row has seen."""
    state = State(*(t.to(DEVICE) for t in case.empty(dtype)))
    seen = torch.zeros(case.batch, dtype=torch.int64, device=DEVICE)
    if n == 0:
        return state, seen
    pads = torch.randint(0, n + 1, (case.batch,), generator=generator).to(DEVICE)
    pads[0] = 0
    _, state = reference.extend(state, *draw(case, case.batch, n, generator, dtype, alike=alike), seen, pads, case.rule)
    return state, n - pads


def check_decode(
    case: Case,
    held: int,
    steps: int,
    dtype: torch.dtype,
    blocks: DecodeBlocks | None = TINY,
    *,
    alike: bool = False,
) -> None:
    """Decode `steps` tokens after `held`, some rows inactive, each step from the reference's state.

    blocks: what to force; None takes the table's. Tensor cores want blocks of at least 16 slots.
    """
    if blocks is not None and DEVICE == "cuda":
        blocks = replace(blocks, block=max(16, blocks.block))
    case, generator = on_device(case), case.generator()
    state, seen = prefilled(case, held, generator, dtype, alike=alike)
    layout = case.layout
    pairs, group = case.batch * layout.kv_heads, layout.heads // layout.kv_heads
    forced = None if blocks is None else plan(blocks, pairs, layout.slots, group, 4)
    for _ in range(steps):
        new = draw(case, case.batch, 1, generator, dtype, alike=alike)
        active = (torch.rand(case.batch, generator=generator) < 0.8).to(DEVICE)
        ours, before = copy(state), copy(state)
        out = launch_decode.decode(ours, *new, seen, active, case.rule, forced)
        expected, state = reference.extend(before, *new, seen, (~active).long(), case.rule, decoded=True)
        close(out[active], expected[active])
        assert bool((out[~active] == 0).all())
        same_states(ours, state)
        for after, was in zip(ours, before, strict=True):
            assert torch.equal(after[~active], was[~active])
        seen = seen + active


def check_extend(case: Case, held: int, n: int, dtype: torch.dtype, blocks: ExtendBlocks | None = SMALL) -> None:
    """n more columns for some rows, padded, after `held` tokens."""
    case, generator = on_device(case), case.generator()
    state, seen = prefilled(case, held, generator, dtype)
    some = int(torch.randint(1, case.batch + 1, (), generator=generator))
    rows = torch.randperm(case.batch, generator=generator)[:some]
    pads = torch.randint(0, n + 1, (len(rows),), generator=generator) * (torch.rand((), generator=generator) < 0.5)
    rows, pads = rows.to(DEVICE), pads.to(DEVICE)
    new = draw(case, len(rows), n, generator, dtype)
    ours = copy(state)
    out = launch_extend.extend(ours, *new, rows, seen, pads, case.rule, blocks)
    mine = State(*(tensor[rows] for tensor in state))
    expected, folded = reference.extend(mine, *new, seen[rows], pads, case.rule)
    for tensor, part in zip(state, folded, strict=True):
        tensor[rows] = part
    close(out, expected)
    same_states(ours, state)
