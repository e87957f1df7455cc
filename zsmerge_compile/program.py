"""The sealed result of the passes: what every backend, exporter and runtime starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from zsmerge_compile.models.spec import ModelSpec
from zsmerge_compile.ops.policy import CachePolicy, Site
from zsmerge_compile.ops.state import LayerLayout


@dataclass(frozen=True)
class Program:
    """A model whose attentions are cache ops.

    prefill  (input_ids [b, T], position_ids [b, T], rows [b], seen [B], pads [b], *state) -> logits [b, vocab]
    decode   (input_ids [B, 1], seen [B], active [B], *state) -> logits [B, vocab]

    state: the tensors of layer 0, then of layer 1, ..., in the order of `policy.state_fields`; mutated in place.
    Parameters and buffers are the given model's own tensors.
    """

    prefill: fx.GraphModule
    decode: fx.GraphModule
    spec: ModelSpec
    policy: CachePolicy
    sites: tuple[Site, ...]
    layouts: tuple[LayerLayout, ...]
    counts: dict[str, dict[str, int]]  # graph -> pass -> rewrites
    batch_size: int
    dtype: torch.dtype
    device: torch.device

    def allocate(self) -> list[tuple[Tensor, ...]]:
        """An empty cache: one state per layer, of ordinary tensors even under torch.inference_mode."""
        with torch.inference_mode(False):
            return [self.policy.allocate(layout, self.batch_size, self.dtype, self.device) for layout in self.layouts]
