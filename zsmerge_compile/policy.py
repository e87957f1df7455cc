"""ZSMerge as a cache policy: from its config to layouts and op arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zsmerge_compile.config import ZSMergeConfig
from zsmerge_compile.ops import contracts
from zsmerge_compile.ops.policy import Site
from zsmerge_compile.ops.state import LayerLayout, State, allocate


class ZSMergePolicy:
    """Ring of recent tokens, best-scoring context, merged residual (see `ops/reference.py`)."""

    name = "zsmerge"
    state_fields: tuple[str, ...] = State._fields

    def __init__(self, config: ZSMergeConfig) -> None:
        self.config = config
        self.decode_op = contracts.DECODE
        self.extend_op = contracts.EXTEND

    def describe(self) -> dict[str, Any]:
        """The config's fields."""
        return self.config.describe()

    def layouts(self, sites: Sequence[Site]) -> tuple[LayerLayout, ...]:
        """Budgets per layer; a layer with a sliding window gets no more than `window` slots."""
        budgets = self.config.layer_budgets(len(sites))
        return tuple(
            LayerLayout(site.heads, site.kv_heads, site.head_dim, *self.config.split(budget, site.window), site.window)
            for site, budget in zip(sites, budgets, strict=True)
        )

    def allocate(self, layout: LayerLayout, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        """An empty state of one layer."""
        return allocate(layout, batch_size, dtype, device)

    def decode_arguments(self, site: Site, layout: LayerLayout, slopes: Any) -> tuple[Any, ...]:
        """Arguments after `active`."""
        config = self.config
        sizes = (layout.proximity, layout.context, layout.window)
        return (slopes, *sizes, config.alpha, config.decay, site.scale, site.alibi_divisor, site.alibi_bf16)

    def extend_arguments(self, site: Site, layout: LayerLayout, slopes: Any) -> tuple[Any, ...]:
        """Arguments after `pads`."""
        return (*self.decode_arguments(site, layout, slopes), self.config.merge)
