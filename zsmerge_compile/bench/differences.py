"""In words, how what a kernel gave differs from what the specification gives."""

from __future__ import annotations

import torch
from torch import Tensor

from zsmerge_compile.ops.state import State
from zsmerge_compile.testing.tolerance import OP_FP32

HALF = 2e-2  # bf16, fp16: an output's error as a share of its norm; the reference works in fp32 on the same inputs
SCORE_HALF = 1e-3  # of a decode step, whose logits are fp32; a prompt's may be rounded to half: HALF


def of_outputs(got: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """In words, or empty. NaN differs."""
    error = (got.float() - expected.float()).abs()
    if dtype == torch.float32:
        good = bool((error <= OP_FP32 * (1 + expected.abs())).all())
        return "" if good else f"outputs differ by {float(error.max()):.1e}, allowed {OP_FP32:.0e}"
    share = float(error.norm() / expected.float().norm())
    return "" if share <= HALF else f"outputs differ by {share:.1e} of their norm, allowed {HALF:.0e}"


def of_states(ours: State, theirs: State, dtype: torch.dtype, score_half: float = SCORE_HALF) -> str:
    """The first field that differs in live slots, whatever slots the two use; in words, or empty.

    score_half: how far scores may be apart in half precision, as a share of 1 + the score.
    """
    half = dtype != torch.float32
    mine, other = ordered(ours), ordered(theirs)
    for name, ours_part in mine.items():
        theirs_part = other[name]
        error = (ours_part.double() - theirs_part.double()).abs()
        allowed = 0.0 if name == "position" else OP_FP32
        if half and name in ("score", "key", "value"):
            allowed = score_half if name == "score" else HALF
        if not bool((error <= allowed * (1 + theirs_part.double().abs())).all()):
            return f"{name} of the cache differs in {int((error > allowed).sum())} places, by {float(error.max()):.1e}"
    return ""


def ordered(state: State) -> dict[str, Tensor]:
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
    parts |= {"mean position": state.residual_position, "order of opening": state.opened}
    for name, part in parts.items():
        residual = _take(part, merged, rank)
        found[name] = torch.cat([found[name], residual], 2) if name in found else residual
    return found


def _take(part: Tensor, live: Tensor, rank: Tensor) -> Tensor:
    alive = live if part.dim() == 3 else live[..., None]
    index = rank if part.dim() == 3 else rank[..., None].expand(part.shape)
    return torch.where(alive, part, torch.zeros_like(part)).gather(2, index)
