"""KVMerger: a prompt's tokens are merged in sets of neighbours whose keys are alike.

    cut where cos(k_i, k_(i-1)) <= threshold;  p = the set's member with the highest attention
    g_i = exp(-||k_p - k_i||^2 / (2 sigma^2));  w_i = g_i / sum g
    key = sum w_i k_i;  value = |S| sum w_i v_i    of a set S

Not merged are the most recent tokens and those with the highest attention (sums over all queries).
Source: Wang et al., "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks";
threshold 0.75. sigma is printed as sum g / (sqrt(2) |S|), which takes g to know g and is at most 0.71, while the
values reported are near 5 and the ablation's best is 5: here it is a parameter. At half of the cache 0.17 of the
prompt is recent and 0.12 has the highest attention: 0.34 and 0.24 of the budget.

Ours, as the number of sets depends on the prompt and a static cache has a fixed number of slots: sets="threshold" is
the published rule, but where it makes more sets than there are slots, only the lowest cosines are cut; sets="fixed"
cuts at the lowest always, into as many sets as there are slots, so that nothing is merged that need not be.
`normalized` leaves |S| out of the value. Adjacent are tokens with none but recent or high ones between them. A slot
weighs as many tokens as are in it, without a bias for it, has the sum of their scores, and the position of the newest
(for ALiBi and windows). The paper leaves the decoded tokens unmerged and the cache growing: here they compete by score
with what is held, as in `policies/h2o.py`, and what leaves is lost; a later prompt merges held slots and its tokens
again, a slot counting as one member. A layer whose own window fits into the budget merges nothing. The paper does not
merge in the first and last layers either: with a budget that is given that would only leave them to evict; give those
layers larger budgets and sets="fixed", which merges nothing that fits (the published rule merges what is alike even
where there is room, so that at full budget it is not the untouched model).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from zsmerge_compile.errors import ConfigError, must
from zsmerge_compile.ops.policy import Site
from zsmerge_compile.ops.sets import SETS
from zsmerge_compile.ops.state import LayerLayout, Rule
from zsmerge_compile.policies.zsmerge import Evicting, evicting_config


class KVMergerPolicy(Evicting):
    """budget (slots, or one count per layer), recent and top (counts, or shares of it), sets, threshold, sigma."""

    name = "kvmerger"
    keeps = "recent tokens and the highest sums of attention, a prompt's others merged in sets"
    merges_context = True

    def rule(self, site: Site, layout: LayerLayout) -> Rule:
        rule, told = super().rule(site, layout), self.describe()
        if layout.window is not None and layout.window <= layout.budget:
            return rule
        merging = {name: told[name] for name in ("sets", "threshold", "sigma", "normalized")}
        return replace(rule, pinned=count_of(told["top"], layout.budget), **merging)


def make(
    budget: Any,
    recent: int | float = 0.34,
    top: int | float = 0.24,
    sets: str = "threshold",
    threshold: float = 0.75,
    sigma: float = 5.0,
    normalized: bool = False,
) -> KVMergerPolicy:
    """Raises ConfigError."""
    config = evicting_config(budget, recent, "recent", decay=1.0)
    if not _is_number(top) or top < 0 or (isinstance(top, float) and top > 1):
        raise ConfigError(must("top", "a count, or a share in [0.0, 1.0]", repr(top)))
    for slots in (config.budget,) if isinstance(config.budget, int) else config.budget:
        context = config.split(slots).context
        if count_of(top, slots) >= context:
            got = f"{slots - context} + {count_of(top, slots)}"
            raise ConfigError(must("recent + top", f"less than the budget of {slots} slots, for merged sets", got))
    if sets not in SETS:
        raise ConfigError(must("sets", f"one of {', '.join(SETS)}", repr(sets)))
    if not _is_number(threshold) or not -1 <= threshold <= 1:
        raise ConfigError(must("threshold", "a cosine, a number in [-1, 1]", repr(threshold)))
    if not _is_number(sigma) or not 1e-6 <= sigma <= 1e6:
        raise ConfigError(must("sigma", "a number in [1e-6, 1e6], a distance between keys", repr(sigma)))
    if not isinstance(normalized, bool):
        raise ConfigError(must("normalized", "True or False", repr(normalized)))
    given = dict(recent=recent, top=top, sets=sets, threshold=threshold, sigma=sigma, normalized=normalized)
    return KVMergerPolicy(config, **given)


def count_of(top: int | float, budget: int) -> int:
    """Slots for the tokens of the highest attention."""
    return round(top * budget) if isinstance(top, float) else top


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
