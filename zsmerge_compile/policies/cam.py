"""CaM: the tokens of StreamingLLM, and the values of the others merged into some of them.

    p_i = clamp(A_i / mean(A over the next m kept tokens), 0, 1);  M_i ~ Bernoulli(p_i)
    v_j = v_j + M_i v_i / m    for those m tokens j, when token i leaves the newest ones;  its key is dropped

The first `sinks` tokens of a row stay, and the newest budget - sinks. A is the attention of the step at hand.
Source: Zhang et al., "CaM: Cache Merging for Memory-efficient LLMs Inference", and its code: m = 32, as many first as
recent tokens. (Its cam_hf takes the mean over all recent tokens, and merges a token one step before it leaves; its
generate_task has the mean over the m, m = 16 and sums of attention over steps.)

Ours: A is added up over the query heads of a group. Of several tokens at once, a prompt or a chunk, all that leave are
merged into the m oldest of the newest ones, and A is the last query's, whose output the merged values then keep as far
as no p is cut to 1 (cam_hf drops the middle of a prompt unmerged). Draws are a hash of seed, layer, head and position,
so that they are the same on every backend, for every batch and padding. draw="expectation" has p_i in place of M_i:
the mean of all draws. Where fewer than m of the newest tokens are kept, those get an m-th part each, as in the
code. Values are added, not averaged: where p stays near 1 for a long text they grow without bound, as published.
Positions are those of the text; what `policies/streaming.py` says of sinks and windows holds here too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zsmerge_compile.errors import ConfigError, must
from zsmerge_compile.ops import cam
from zsmerge_compile.ops.policy import Site
from zsmerge_compile.ops.state import LayerLayout, Rule
from zsmerge_compile.policies.streaming import StreamingPolicy, config_of

DRAWS = ("bernoulli", "expectation")


class CaMPolicy(StreamingPolicy):
    """budget (slots, or one count per layer), sinks (tokens, 4), merged (m, tokens, 32), draw, seed, prefill, chunk."""

    name = "cam"
    keeps = "the first tokens and recent ones, the values of others merged into some"
    observed = 1
    merges_context = True

    def rule(self, site: Site, layout: LayerLayout) -> Rule:
        told = self.describe()
        seed = cam.layer_seed(told["seed"], site.layer) if told["draw"] == "bernoulli" else None
        return replace(super().rule(site, layout), merged=told["merged"], seed=seed)


def make(
    budget: Any,
    sinks: int = 4,
    merged: int = 32,
    draw: str = "bernoulli",
    seed: int = 0,
    prefill: str = "full",
    chunk: int = 512,
) -> CaMPolicy:
    """Raises ConfigError."""
    config = config_of(budget, sinks, "text", prefill, chunk)
    for name, value, least in (("merged", merged, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**32:
            raise ConfigError(must(name, f"an integer from {least} to 2**32 - 1", repr(value)))
    if draw not in DRAWS:
        raise ConfigError(must("draw", f"one of {', '.join(DRAWS)}", repr(draw)))
    return CaMPolicy(config, sinks=sinks, merged=merged, draw=draw, seed=seed, prefill=prefill, chunk=chunk)
