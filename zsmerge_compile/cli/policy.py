"""--policy: a cache policy and its parameters as one word, `h2o` or `snapkv:window=16,pooling=max`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from zsmerge_compile.errors import ConfigError, must

if TYPE_CHECKING:
    from zsmerge_compile.ops.policy import CachePolicy

POLICY_HELP = "which tokens the cache keeps: NAME, or NAME:key=value,... (zsmerge)"
_FORM = "NAME or NAME:key=value,key=value"
_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}
TRAINED = ("less",)  # policies that need weights, made for one model
ROOMY = 4096  # slots that any policy can be made with


@dataclass(frozen=True)
class Choice:
    """A policy that is made once the budget is known; its name and parameters are looked at then."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def text(self) -> str:
        """As it would be written on the command line."""
        given = ",".join(f"{key}={_word(value)}" for key, value in self.parameters.items())
        return f"{self.name}:{given}" if given else self.name

    def make(self, budget: int, **options: Any) -> CachePolicy:
        """The policy; options are those of the command line, None where not given. Raises ConfigError."""
        from zsmerge_compile import policies

        given = {"budget": budget, **{name: value for name, value in options.items() if value is not None}}
        for name in given:
            if name in self.parameters:
                raise ConfigError(must(f"{name} of a policy", "left to the command's other options", self.text))
        return policies.policy(self.name, **given, **self.parameters)

    def with_weights(self, weights: Any) -> Choice:
        """The same with `weights`, where the policy needs some and none are named."""
        if self.name not in TRAINED or "weights" in self.parameters:
            return self
        return replace(self, parameters={"weights": weights, **self.parameters})


ZSMERGE = Choice("zsmerge")


def policy(text: str) -> Choice:
    """argparse type. Values are integers, numbers, true, false, none or else text."""
    name, colon, rest = text.partition(":")
    parts = rest.split(",") if colon else []
    pairs = [part.partition("=") for part in parts]
    keys = [key for key, _, _ in pairs]
    if not name or "" in keys or len(set(keys)) < len(keys) or not all(sign and value for _, sign, value in pairs):
        raise argparse.ArgumentTypeError(f"a policy must be {_FORM}, got {text}")
    return Choice(name, {key: _value(value) for key, _, value in pairs})


def every_policy() -> tuple[Choice, ...]:
    """A choice for each policy there is, all parameters at their defaults; other names of the same are left out."""
    from zsmerge_compile.policies import names

    return tuple(
        choice for choice in map(Choice, names()) if (made := _made(choice)) is None or made.name == choice.name
    )


def keeps(choice: Choice) -> str:
    """What the policy keeps, in a few words; empty where its own class does not say."""
    made = _made(choice)
    return "" if made is None else str(vars(type(made)).get("keeps", ""))


def _made(choice: Choice) -> CachePolicy | None:
    try:
        return choice.with_weights({}).make(ROOMY)
    except ConfigError:
        return None


def _word(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    return text


def add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", type=policy, default=ZSMERGE, metavar="POLICY", help=POLICY_HELP)
