"""What a layer's attention mask means, once the graph that computes it has been evaluated."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskKind:
    """Which keys a query sees, and the bias it adds to their logits.

    kind           "causal": query q sees keys k <= q. "sliding_window": k <= q and q - k < window. "alibi": as causal
                   (as sliding_window where window is set), with a bias per query head that grows with the position
    window         tokens a query sees, itself included; None: all
    slopes         [H] of "alibi", fp32 values, else None
    alibi_divisor  see `bias`
    alibi_bf16     see `bias`
    """

    kind: Literal["causal", "sliding_window", "alibi"]
    window: int | None = None
    slopes: tuple[float, ...] | None = None
    alibi_divisor: float = 1.0
    alibi_bf16: bool = False

    def bias(self, position: Tensor, dtype: torch.dtype) -> Tensor:
        """ALiBi bias [H, n] of keys at whole positions [n], in the model's `dtype` where that rounds it.

        alibi_bf16      (bf16(slope) * bf16(position), rounded to bf16).to(dtype) / alibi_divisor, in dtype
        not alibi_bf16  slope * position / alibi_divisor, in fp32

        A constant per query may be missing, which softmax does not see. Positions count from 0 at a row's first real
        token. A merged slot's bias is slope * mean position / alibi_divisor, unrounded.
        """
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=position.device)[:, None]
        if not self.alibi_bf16:
            return slopes * position.float() / self.alibi_divisor
        return (slopes.bfloat16() * position.bfloat16()).to(dtype) / self.alibi_divisor
