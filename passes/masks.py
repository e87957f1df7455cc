"""What a layer's attention mask means, once the graph that computes it has been evaluated."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MaskKind:
    """Which keys a query sees, and the bias it adds to their logits.

    kind           "causal": query q sees keys k <= q. "sliding_window": k <= q and q - k < window. "alibi": as causal
                   (as sliding_window where window is set), with a bias per query head that grows with the position
    window         tokens a query sees, itself included; None: all
    slopes         [H] of "alibi", fp32 values, else None
    alibi_divisor  see below
    alibi_bf16     see below

    The bias of the key at integer position p, in head h, is

        alibi_bf16      (bf16(slopes[h]) * bf16(p), rounded to bf16).to(model dtype) / alibi_divisor
        not alibi_bf16  slopes[h] * p / alibi_divisor in fp32

    up to a constant per query, which softmax does not see. Positions count from 0 at a row's first real token. A merged
    slot's bias is slopes[h] * mean position / alibi_divisor, unrounded.
    """

    kind: Literal["causal", "sliding_window", "alibi"]
    window: int | None = None
    slopes: tuple[float, ...] | None = None
    alibi_divisor: float = 1.0
    alibi_bf16: bool = False
