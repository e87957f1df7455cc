"""Our methods and the single changes to the paper's values that the ablations try, as configs of a budget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import zsmerge_compile as zs
from quality_tool.material import TRUTH
from zsmerge_compile.cli.policy import Choice, every_policy
from zsmerge_compile.ops.policy import CachePolicy
from zsmerge_compile.policies import names

SHARES = (1.0, 0.5, 0.2, 0.1, 0.05)  # of the prompt's tokens
FULL_CACHE = "full cache"


class Method(NamedTuple):
    """fields of ZSMergeConfig that differ from the default; cosine: eq. 6 by cosine similarity, in the reference;
    more: slots beyond the budget; policy: a cache policy instead of ZSMerge."""

    fields: dict[str, Any]
    cosine: bool = False
    more: int = 0
    policy: Choice | None = None

    def config(self, budget: int) -> zs.ZSMergeConfig | CachePolicy:
        if self.policy is not None:
            return self.policy.make(budget + self.more)
        return zs.ZSMergeConfig(budget + self.more, **self.fields)


DEFAULT = Method({})


# A press compresses the prompt to the budget and then keeps all of the continuation: it begins with the slots of
# "zsmerge, segment" and ends with those of "zsmerge, a press's last slots", and stands between the two.
METHODS: dict[str, Method] = {
    "zsmerge, segment": Method({"merge": "segment"}),
    "zsmerge, a press's last slots": Method({}, more=TRUTH),
    "zsmerge, sequential": Method({"merge": "sequential"}),
    "zsmerge, chunked segment": Method({"merge": "segment", "prefill": "chunked"}),
    "zsmerge, chunked sequential": Method({"merge": "sequential", "prefill": "chunked"}),
    "eviction only": Method({"residual": 0}),
    "H2O": Method({"residual": 0, "decay": 1.0}),
}

# Policies that are measured as a method of another name; the full cache is no method, and always measured.
KNOWN_AS = {"full": FULL_CACHE, "h2o": "H2O", "zeromerge": "zsmerge, segment", "zsmerge": "zsmerge, segment"}


def default_policies() -> tuple[Choice, ...]:
    """Those that are measured when none are named: all that are not measured as a method anyway."""
    return tuple(choice for choice in every_policy() if choice.text not in KNOWN_AS)


def is_policy(method: str) -> bool:
    """Whether a row is named after a policy."""
    return method.partition(":")[0] in names()


def methods_of(policies: Iterable[Choice]) -> dict[str, Method]:
    """A method for each policy, by the name of its row."""
    made = {KNOWN_AS.get(choice.text, choice.text): Method({}, policy=choice) for choice in policies}
    return {name: METHODS.get(name, method) for name, method in made.items() if name != FULL_CACHE}


ABLATED_SHARES = (0.2, 0.1, 0.05)
PAPER: dict[str, Any] = {"alpha": 0.6, "decay": 0.98}  # the paper's values; what the ablations change one by one
BASE = Method(PAPER)


def _one_by_one(name: str, values: tuple[Any, ...], **more: Any) -> dict[str, Method]:
    return {f"{name}={value}": Method(PAPER | more | {name: value}) for value in values}


# The group's score is a sum; a mean divides all scores of a head by one number and so decides nothing
# (tests/quality/test_methods.py), which is why it has no row.
ABLATIONS: dict[str, Method] = {
    "base": BASE,
    **_one_by_one("merge", ("segment", "sequential")),
    **_one_by_one("proximity", (0.3, 0.4, 0.5, 0.6, 0.7)),
    **_one_by_one("residual", (0, 0.02, 0.05, 0.1)),
    **_one_by_one("alpha", (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
    **_one_by_one("decay", (0.9, 0.95, 0.98, 0.99, 1.0)),
    **_one_by_one("chunk", (64, 128, 256, 512, 1024), prefill="chunked"),
    "residual slot by cosine, segment": Method(PAPER | {"merge": "segment"}, cosine=True),
    "residual slot by cosine, sequential": Method(PAPER | {"merge": "sequential"}, cosine=True),
}
