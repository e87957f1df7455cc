"""H2O: heavy hitters and recent tokens.

    score_i = sum over all queries so far of their attention to i, without decay

After each step the newest `recent` tokens stay, and of the others those with the highest scores; what leaves is lost.
Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models".

Ours: attention is added up over the query heads of a group (the paper has one key/value head per query head); each row
of a batch has its own scores; positions stay the original ones; of equal scores the older token goes. It is ZSMerge
without a residual and without decay.
"""

from __future__ import annotations

from typing import Any

from zsmerge_compile.policies.zsmerge import Evicting, evicting_config


class H2OPolicy(Evicting):
    """budget; recent (a count, or a share as float; the paper has half); prefill and chunk as `ZSMergeConfig`."""

    name = "h2o"
    keeps = "recent tokens and the highest sums of attention"


def make(budget: Any, recent: int | float = 0.5, prefill: str = "full", chunk: int = 512) -> H2OPolicy:
    """Raises ConfigError."""
    config = evicting_config(budget, recent, "recent", decay=1.0, prefill=prefill, chunk=chunk)
    return H2OPolicy(config, recent=recent, prefill=prefill, chunk=chunk)
