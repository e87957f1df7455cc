# mypy: disable-error-code="no-untyped-def"
"""Pieces that several kernels share. Importing this imports triton.

`INTERPRETED` in the kernels is true under TRITON_INTERPRET=1, whose bf16 `tl.dot` multiplies bit patterns and whose
cast to bf16 cuts instead of rounding: there numbers are widened first and rounded by hand.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(2**31 - 1)  # a position, order or slot that loses every comparison for the least


@triton.jit
def as_bf16(x):
    """x, fp32, rounded to the nearest bf16 (ties to even), still in fp32."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def as_type(x, type: tl.constexpr, INTERPRETED: tl.constexpr):
    """x, fp32, in another float type."""
    if INTERPRETED and type == tl.bfloat16:
        x = as_bf16(x)
    return x.to(type)


@triton.jit
def alibi(slope, position, merged, divisor, type: tl.constexpr, BF16: tl.constexpr):
    """`ops.state.alibi_bias`: slope [r, 1], position [1, n] and merged [1, n] give [r, n].

    Merged slots: slope * mean position / divisor. Others, where the model rounds (`BF16`): its own chain.
    """
    exact = tl.math.div_rn(slope * position, tl.zeros_like(slope * position) + divisor)
    if not BF16:
        return exact
    product = as_bf16(as_bf16(slope) * as_bf16(position))
    if type == tl.float16:
        product = product.to(tl.float16).to(tl.float32)
    rounded = tl.math.div_rn(product, tl.zeros_like(product) + divisor)
    if type == tl.float16:
        rounded = rounded.to(tl.float16).to(tl.float32)
    if type == tl.bfloat16:
        rounded = as_bf16(rounded)
    return tl.where(merged, exact, rounded)


@triton.jit
def dots(a, b, INTERPRETED: tl.constexpr):
    """a [m, k] @ b [k, n] in fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
