"""ZSMerge, and what every policy on its ops shares: a ring of recent tokens, a context chosen by score, a residual.

    score = decay * score + attention;  evicted tokens are merged into the residual slot with the largest dot product

Source: Liu et al., "ZSMerge" (eqs. 5-8, Algorithm 1); the rule is executable in `ops/reference.py` and `ops/fold.py`.
ZeroMerge is the method's earlier name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.config import Split, ZSMergeConfig
from zsmerge_compile.errors import ConfigError
from zsmerge_compile.ops import contracts
from zsmerge_compile.ops.policy import Site
from zsmerge_compile.ops.state import LayerLayout, Rule, State, allocate


class ZSMergePolicy:
    """Parameters: those of `ZSMergeConfig`.

    A policy that keeps other tokens by the same ops has a config of its own, another `scoring` (`ops/scores.py`), or
    other budgets per layer.
    """

    name = "zsmerge"
    keeps = "recent tokens and the best scores, the rest merged"  # in a few words, of each class its own
    state_fields: tuple[str, ...] = State._fields
    scoring = "received"
    places = "text"
    merges_context = False
    observed, kernel, pooling = 0, 1, "avg"
    max_tokens: int | None = None  # tokens a row may hold at most

    def __init__(self, config: ZSMergeConfig) -> None:
        self.config = config
        self.decode_op = contracts.DECODE
        self.extend_op = contracts.EXTEND

    @property
    def state_kind(self) -> str:
        """The policy's name: parameters of these policies change what is kept, not what a slot means."""
        return self.name

    @property
    def chunk(self) -> int | None:
        """Columns of a chunk of a prompt; None: prompts go in whole."""
        return self.config.chunk if self.config.prefill == "chunked" else None

    def describe(self) -> dict[str, Any]:
        """The config's fields."""
        return self.config.describe()

    def budgets(self, num_layers: int) -> tuple[int, ...]:
        """Slots per layer. Raises ConfigError."""
        return self.config.layer_budgets(num_layers)

    def split(self, budget: int, window: int | None) -> Split:
        """A layer's slots by part. Raises ConfigError."""
        return self.config.split(budget, window)

    def layouts(self, sites: Sequence[Site]) -> tuple[LayerLayout, ...]:
        """Budgets per layer; a layer with a sliding window gets no more than `window` slots."""
        return tuple(
            LayerLayout(site.heads, site.kv_heads, site.head_dim, *self.split(budget, site.window), site.window)
            for site, budget in zip(sites, self.budgets(len(sites)), strict=True)
        )

    def allocate(
        self, layout: LayerLayout, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        """An empty state of one layer."""
        return allocate(layout, batch_size, dtype, device)

    def rule(self, site: Site, layout: LayerLayout) -> Rule:
        """The constants of one layer."""
        config = self.config
        return Rule(
            layout.proximity,
            layout.context,
            config.alpha,
            config.decay,
            site.scale,
            layout.window,
            config.merge,
            slopes=None if site.slopes is None else torch.tensor(site.slopes, dtype=torch.float32),
            alibi_divisor=site.alibi_divisor,
            alibi_bf16=site.alibi_bf16,
            scoring=self.scoring,
            observed=self.observed,
            kernel=self.kernel,
            pooling=self.pooling,
            places=self.places,
            frequencies=None if site.frequencies is None else torch.tensor(site.frequencies, dtype=torch.float32),
            magnitude=site.magnitude,
        )

    def arguments(self, site: Site, layout: LayerLayout) -> tuple[Any, ...]:
        """The rule's fields."""
        return contracts.spelled(self.rule(site, layout))


class Evicting(ZSMergePolicy):
    """A policy that merges nothing, with parameters of its own, which `describe` tells."""

    def __init__(self, config: ZSMergeConfig, **parameters: Any) -> None:
        super().__init__(config)
        self._parameters = parameters

    def describe(self) -> dict[str, Any]:
        return {"budget": self.config.budget, **self._parameters}


def evicting_config(budget: Any, newest: int | float, called: str, **rest: Any) -> ZSMergeConfig:
    """A config without a residual, whose newest tokens the policy's user knows as `called`. Raises ConfigError."""
    try:
        return ZSMergeConfig(budget, newest, residual=0, alpha=0.0, **rest)
    except ConfigError as error:
        raise ConfigError(str(error).replace("proximity", called)) from None


def make(**parameters: Any) -> ZSMergePolicy:
    """Raises ConfigError."""
    return ZSMergePolicy(ZSMergeConfig(**parameters))
