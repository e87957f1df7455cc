"""Shapes of the C++ operators' results, for tracing."""

from __future__ import annotations

import torch
from torch import Tensor


def register() -> None:
    """Tell torch.library; once per process, after the library is loaded (`build.load`)."""
    for fake in (scored_attention, prompt_attention, absorb):
        torch.library.register_fake(f"zsmerge::{fake.__name__}", fake)


def scored_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """query [B, G, r, D], key [B, G, S, D] -> out [B, G, r, D], mass [B, G, S] fp32."""
    return query.new_empty(query.shape), bias.new_empty(key.shape[:3])


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, slot_key: Tensor, slot_value: Tensor, slot_bias: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    """query [b, H, n, D], slot_key [b, G, S, D] -> out [b, H, n, D], mass [b, G, S + n] fp32."""
    batch, groups, slots, _ = slot_key.shape
    return query.new_empty(query.shape), slot_bias.new_empty(batch, groups, slots + query.shape[2])


def absorb(*state_and_arrivals: Tensor) -> None:
    """Writes the residual slots in place."""
