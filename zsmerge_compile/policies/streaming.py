"""StreamingLLM: attention sinks and recent tokens.

The first `sinks` tokens of a row stay for ever, and the newest budget - sinks tokens. What is between is lost.
Positions are places in the cache: sinks at 0, 1, ..., the newest tokens after them without a gap, so a text has no end.
Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks".

Ours: sinks are the first tokens of each row, padding left out; a layer whose own window is no larger than the budget
needs none. In a layer with a larger window they stay for ever too; but with positions="text" they are seen and kept as
long as the model's own mask lets them, and then the oldest tokens that it lets take their slots. A whole prompt attends
to all of itself, as in the published code. `positions="text"` keeps the positions of the text instead; a text longer
than the model's positions is then refused. Either way a whole prompt must fit into the model's positions together with
what is held when it comes, as it is attended to uncut; with prefill="chunked" it is budget + chunk that must.
"""

from __future__ import annotations

from typing import Any

from zsmerge_compile.config import Split, ZSMergeConfig
from zsmerge_compile.errors import ConfigError, must
from zsmerge_compile.policies.zsmerge import Evicting

POSITIONS = ("cache", "text")


class StreamingPolicy(Evicting):
    """budget (slots, or one count per layer), sinks (tokens, 4 as published), positions ("cache" or "text"), prefill
    and chunk as `ZSMergeConfig`."""

    name = "streaming"
    keeps = "the first tokens and recent ones"
    scoring = "age"

    def split(self, budget: int, window: int | None) -> Split:
        return split_of(self.describe()["sinks"], budget, window)


def split_of(sinks: int, budget: int, window: int | None) -> Split:
    """Sinks as the context, the rest as the ring; a layer's own window alone where it fits."""
    if window is not None and window <= budget:
        return Split(window, 0, 0)
    return Split(budget - sinks, sinks, 0)


def make(
    budget: Any, sinks: int = 4, positions: str = "cache", prefill: str = "full", chunk: int = 512
) -> StreamingPolicy:
    """Raises ConfigError."""
    config = config_of(budget, sinks, positions, prefill, chunk)
    policy = StreamingPolicy(config, sinks=sinks, positions=positions, prefill=prefill, chunk=chunk)
    policy.places = positions
    return policy


def config_of(budget: Any, sinks: object, positions: object, prefill: str, chunk: int) -> ZSMergeConfig:
    """Nothing is merged and nothing scored. Raises ConfigError."""
    config = ZSMergeConfig(budget, 1, residual=0, alpha=0.0, decay=0.0, prefill=prefill, chunk=chunk)
    check_sinks(sinks, config)
    if positions not in POSITIONS:
        raise ConfigError(must("positions", f"one of {', '.join(POSITIONS)}", repr(positions)))
    return config


def check_sinks(sinks: object, config: ZSMergeConfig) -> None:
    """Raises ConfigError where a layer has no slot besides them."""
    smallest = config.budget if isinstance(config.budget, int) else min(config.budget)
    if not isinstance(sinks, int) or isinstance(sinks, bool) or not 0 <= sinks < smallest:
        raise ConfigError(must("sinks", f"a count below the budget of {smallest}", repr(sinks)))
