"""SnapKV: the prompt's tokens that its last queries look at, and their neighbours.

    score_i = pool over `kernel` tokens around i of sum over the last `window` queries of their attention to i

A prompt longer than the budget leaves its last `window` tokens and the budget - window others of the highest scores.
Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation".

Published for the prompt only; after it the cache grows. Ours after the prompt: the newest `window` tokens stay, the
prompt's chosen tokens keep their slots, and slots that no prompt token took make the window longer: of the decoded
tokens the newest stay. A later prompt scores all that is held anew, and pools over its own tokens.
Attention is added up over the query heads of a group before pooling (kvpress: the mean, the same order for "avg").
"""

from __future__ import annotations

from typing import Any

from zsmerge_compile.config import ZSMergeConfig
from zsmerge_compile.errors import ConfigError, must
from zsmerge_compile.ops.scores import POOLINGS
from zsmerge_compile.policies.zsmerge import Evicting, evicting_config


class SnapKVPolicy(Evicting):
    """budget (slots, or one count per layer), window (queries, 32), kernel (tokens, odd, 5), pooling ("avg" or "max").

    The defaults are those of the published code; the paper's runs have kernel=7, pooling="max".
    """

    name = "snapkv"
    keeps = "what a prompt's last queries look at, and recent tokens"
    scoring = "observed"

    def __init__(self, config: ZSMergeConfig, **parameters: Any) -> None:
        super().__init__(config, **parameters)
        self.observed, self.kernel, self.pooling = (parameters[name] for name in ("window", "kernel", "pooling"))
        check_window(self.kernel, "kernel")
        if self.kernel % 2 == 0:
            raise ConfigError(must("kernel", "odd, so that it has a middle", self.kernel))
        if self.pooling not in POOLINGS:
            raise ConfigError(must("pooling", f"one of {', '.join(POOLINGS)}", repr(self.pooling)))


def check_window(value: object, name: str = "window") -> None:
    """Raises ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(must(name, "a count of at least 1", repr(value)))


def make(budget: Any, window: int = 32, kernel: int = 5, pooling: str = "avg") -> SnapKVPolicy:
    """Raises ConfigError."""
    check_window(window)
    config = evicting_config(budget, window, "window")
    return SnapKVPolicy(config, window=window, kernel=kernel, pooling=pooling)
