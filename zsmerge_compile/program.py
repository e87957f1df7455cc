"""The sealed result of the passes, what every backend and exporter starts from; and what a runtime must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from zsmerge_compile.models.spec import ModelSpec
from zsmerge_compile.ops.places import BOUNDED
from zsmerge_compile.ops.policy import CachePolicy, Site
from zsmerge_compile.ops.state import LayerLayout


class TensorSpec(NamedTuple):
    """A tensor without its content."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Interface:
    """What a runtime must know of two graphs to call them.

    kind    whose state it is (`CachePolicy.state_kind`)
    parts   one per layer: what its slots are for, by name ({"proximity": 10, "context": 8, ...})
    state   one per layer: its tensors by name, in the order in which the graphs take them; an empty cache is all zeros
    """

    batch_size: int
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    max_positions: int | None  # tokens a row can see; None: no limit
    max_places: int | None  # the same of a prompt and what is held before it, where only these count
    kind: str
    parts: tuple[dict[str, int | None], ...]
    state: tuple[dict[str, TensorSpec], ...]

    @property
    def held(self) -> int:
        """Tokens that a row holds at most."""
        return max(sum(layer[name] or 0 for name in ("proximity", "context", "residual")) for layer in self.parts)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The graphs' names of all tensors of `state`."""
        return tuple(f"layer{number}_{name}" for number, layer in enumerate(self.state) for name in layer)

    def allocate(self) -> list[dict[str, Tensor]]:
        """An empty cache, of ordinary tensors even under torch.inference_mode."""
        with torch.inference_mode(False):
            return [
                {name: torch.zeros(spec.shape, dtype=spec.dtype, device=self.device) for name, spec in layer.items()}
                for layer in self.state
            ]


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
        """An empty cache: one state per layer, as `Interface.allocate` makes it."""
        return [tuple(layer.values()) for layer in self.interface().allocate()]

    def interface(self) -> Interface:
        """What a runtime must know."""
        positions, places = self.spec.max_positions, self.policy.places
        limits = [limit for limit in (positions, self.policy.max_tokens) if limit is not None]
        return Interface(
            batch_size=self.batch_size,
            dtype=self.dtype,
            device=self.device,
            vocab_size=self.spec.vocab_size,
            max_positions=None if places in BOUNDED else min(limits, default=None),
            max_places=positions if places == "cache" else None,
            kind=self.policy.state_kind,
            parts=tuple(layout.parts() for layout in self.layouts),
            state=tuple(self._specs(layout) for layout in self.layouts),
        )

    def _specs(self, layout: LayerLayout) -> dict[str, TensorSpec]:
        tensors = self.policy.allocate(layout, self.batch_size, self.dtype, torch.device("meta"))
        named = zip(self.policy.state_fields, tensors, strict=True)
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in named}
