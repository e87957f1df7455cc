"""LM-Infinite: a mask in the shape of a lambda, and a limit for distances.

    a query sees the first `sinks` tokens and the last L = budget - sinks + 1, itself included
    the distance to a first token that is L away or more counts as L

so that no text is too long. Decoding it keeps the tokens that StreamingLLM keeps; the mask holds for prompts as well.
Source: Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models".

Ours: L is what the budget leaves beside the first tokens (the published code has L = 4096 and sinks = 10; its optional
tokens from the middle, off by default, are left out). First tokens are those of each row, padding left out. A layer
whose own window is no larger than the budget has that window alone. `positions="text"` keeps true distances, with the
same mask; a text longer than the model's positions is then refused.
"""

from __future__ import annotations

from typing import Any

from zsmerge_compile.policies.streaming import StreamingPolicy, config_of

PLACES = {"cache": "capped", "text": "lambda"}


class LMInfinitePolicy(StreamingPolicy):
    """budget (slots, or one count per layer), sinks (tokens, 10 as published), positions ("cache": distances capped, or
    "text"), prefill and chunk as `ZSMergeConfig`."""

    name = "lm_infinite"
    keeps = "the first tokens and recent ones, distances capped"


def make(
    budget: Any, sinks: int = 10, positions: str = "cache", prefill: str = "full", chunk: int = 512
) -> LMInfinitePolicy:
    """Raises ConfigError."""
    config = config_of(budget, sinks, positions, prefill, chunk)
    policy = LMInfinitePolicy(config, sinks=sinks, positions=positions, prefill=prefill, chunk=chunk)
    policy.places = PLACES[positions]
    return policy
