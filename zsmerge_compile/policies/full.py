"""The full cache in static shape: every token is kept, and a row that would need more slots is refused.

The baseline on the same ops, kernels and runtime as every other policy: keys and values are read once per key/value
head. A layer with a sliding window needs no more slots than the window.
"""

from __future__ import annotations

from typing import Any

from zsmerge_compile.config import ZSMergeConfig
from zsmerge_compile.policies.zsmerge import Evicting


class FullPolicy(Evicting):
    """budget: tokens a row can hold, or one count per layer, of which the smallest counts; prefill, chunk.

    A prompt or token that needs more is refused; `generate` ends a row there.
    """

    name = "full"
    keeps = "everything; a row that needs more slots is refused"


def make(budget: Any, prefill: str = "full", chunk: int = 512) -> FullPolicy:
    """Raises ConfigError."""
    config = ZSMergeConfig(budget, 1.0, residual=0, alpha=0.0, decay=0.0, prefill=prefill, chunk=chunk)
    made = FullPolicy(config, prefill=prefill, chunk=chunk)
    made.max_tokens = config.budget if isinstance(config.budget, int) else min(config.budget)
    return made
