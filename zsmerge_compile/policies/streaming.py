"""StreamingLLM: attention sinks and recent tokens.

The first `sinks` tokens of a row stay for ever, and the newest budget - sinks tokens. What is between is lost.
Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks".

Ours: sinks are the first tokens of each row, padding left out; a layer whose own window is no larger than the budget
needs none. Keys keep the positions they had in the text; the paper counts positions by place in the cache, for which
keys would have to be kept before their rotation (not built yet), so a text longer than the model's positions is
refused.
"""

from __future__ import annotations

from typing import Any

from zsmerge_compile.config import Split, ZSMergeConfig
from zsmerge_compile.errors import ConfigError, must
from zsmerge_compile.policies.zsmerge import Evicting


class StreamingPolicy(Evicting):
    """budget (slots, or one count per layer), sinks (tokens, 4 as published), prefill and chunk as `ZSMergeConfig`."""

    name = "streaming"
    scoring = "age"

    def split(self, budget: int, window: int | None) -> Split:
        if window is not None and window <= budget:
            return Split(window, 0, 0)
        sinks = self.describe()["sinks"]
        return Split(budget - sinks, sinks, 0)


def make(budget: Any, sinks: int = 4, prefill: str = "full", chunk: int = 512) -> StreamingPolicy:
    """Raises ConfigError."""
    config = ZSMergeConfig(budget, 1, residual=0, alpha=0.0, decay=0.0, prefill=prefill, chunk=chunk)
    check_sinks(sinks, config)
    return StreamingPolicy(config, sinks=sinks, prefill=prefill, chunk=chunk)


def check_sinks(sinks: int, config: ZSMergeConfig) -> None:
    """Raises ConfigError where a layer has no slot besides them."""
    smallest = config.budget if isinstance(config.budget, int) else min(config.budget)
    if not isinstance(sinks, int) or isinstance(sinks, bool) or not 0 <= sinks < smallest:
        raise ConfigError(must("sinks", f"a count below the budget of {smallest}", repr(sinks)))
