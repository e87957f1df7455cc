"""Recover ALiBi's slopes, and how they were rounded, from evaluated biases."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from zsmerge_compile.passes.masks import MaskKind

# Allowed deviation relative to the biases compared. A mask in half precision deviates from any closed form by its own
# rounding; two roundings happen where transformers adds ALiBi twice (Falcon with eager attention).
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def fit_alibi(bias: Tensor, visible: Tensor, query: Tensor, heads: int, head_dim: int, dtype: torch.dtype) -> MaskKind:
    """The ALiBi that comes closest to `bias` [heads or 1, R, n] (float64) at queries `query` [R] where `visible`.

    Tried are plain slopes, and slopes times positions rounded to bf16, divided by sqrt(head_dim) or not. dtype is the
    model's. Whether the best is good enough: `deviation`.
    """
    keys = visible[0, -1].nonzero().flatten()
    last = bias[:, -1]
    low, high = int(keys[0]), int(keys[-1])
    plain = (last[:, high] - last[:, low]) / max(high - low, 1)
    candidates = [_kind(plain.expand(heads), 1.0, False)]
    anchor = 2 ** int(math.log2(high)) if high > 0 else 1  # exact in bf16, as is its product with a slope
    if low <= anchor:
        for divisor in (math.sqrt(head_dim), 1.0):
            slopes = (last[:, anchor] * divisor / anchor).expand(heads)
            nearest = slopes.bfloat16()
            kinds = [_kind(_next(nearest, step), divisor, True) for step in (-1, 0, 1)]
            candidates.append(_best_by_head(kinds, bias, visible, query, dtype))
    return min(candidates, key=lambda kind: float(deviation(kind, bias, visible, query, dtype).max()))


def deviation(kind: MaskKind, bias: Tensor, visible: Tensor, query: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest relative deviation [H] of kind's bias from `bias`, both taken relative to the query's own position."""
    assert kind.slopes is not None
    closed = kind.bias(torch.arange(bias.shape[-1], device=bias.device), dtype).double()
    own = query[None, :, None].expand(bias.shape[0], -1, 1)
    reference = bias.gather(-1, own)  # [heads or 1, R, 1]
    difference = (bias - reference) - (closed[:, None] - closed[:, query, None])
    scale = bias.abs() + reference.abs() + 1e-3
    return (difference.abs() / scale).masked_fill(~visible, 0.0).amax((-1, -2))


def _best_by_head(kinds: list[MaskKind], bias: Tensor, visible: Tensor, query: Tensor, dtype: torch.dtype) -> MaskKind:
    """Every head's slope from whichever kind fits it best, the middle one on a tie."""
    middle = kinds[1]
    errors = torch.stack([deviation(kind, bias, visible, query, dtype) for kind in kinds])
    errors[1] -= 1e-12
    chosen = errors.argmin(0).tolist()
    columns = list(zip(*(kind.slopes or () for kind in kinds), strict=True))
    return replace(middle, slopes=tuple(columns[head][which] for head, which in enumerate(chosen)))


def _kind(slopes: Tensor, divisor: float, bf16: bool) -> MaskKind:
    rounded = tuple(slopes.float().tolist())
    return MaskKind("alibi", slopes=rounded, alibi_divisor=divisor, alibi_bf16=bf16)


def _next(numbers: Tensor, step: int) -> Tensor:
    """bf16 numbers moved by `step` units in the last place."""
    return (numbers.view(torch.int16) + step).view(torch.bfloat16)
