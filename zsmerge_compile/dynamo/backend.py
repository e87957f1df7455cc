"""What `torch.compile(backend="zsmerge")` calls, registered as an entry point of `torch_dynamo_backends`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.symbolic_convert import InstructionTranslator

from zsmerge_compile.config import ZSMergeConfig
from zsmerge_compile.dynamo.cache import ModelCache
from zsmerge_compile.dynamo.call import Call
from zsmerge_compile.dynamo.handed import Handed, hand_over
from zsmerge_compile.errors import ConfigError, must
from zsmerge_compile.lower.inductor import lower_graph
from zsmerge_compile.ops.policy import CachePolicy
from zsmerge_compile.passes import pipeline
from zsmerge_compile.policies import policy_of
from zsmerge_compile.runtime.runner import Runner

LOWER = ("inductor", "eager")
HINT = (
    "cache = zs.new_cache(model, config, batch_size), then "
    'torch.compile(model, backend="zsmerge", options={"config": config, "cache": cache}, fullgraph=True)'
)


def zsmerge(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: Any = None
) -> Callable[..., tuple[Any, ...]]:
    """Dynamo's graph of the model, over the caller's cache.

    options: "config", "cache" (`zsmerge_compile.new_cache`), and "lower": "inductor" (the default) or "eager"

    A graph with one column per row is a decode step, any other a prompt or more of one. Raises ConfigError,
    UnsupportedGraphError or UnsupportedMaskError, which reach the caller inside torch._dynamo's BackendCompilerFailed.
    """
    cache, lower = _checked(options, mode)
    if not InstructionTranslator.current_tx().one_graph:
        # past its recompile limit Dynamo would run the original model, without the cache and without a word
        raise ConfigError(must('fullgraph with backend="zsmerge"', "True", "False", HINT))
    with torch._guards.tracing(None):  # what is traced here is not part of what Dynamo traces
        runner, graph = _compiled(gm, example_inputs, cache, lower)
    return Call(runner, graph, options or {})


def _compiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], cache: ModelCache, lower: str
) -> tuple[Runner, Handed]:
    graph = hand_over(gm, example_inputs, cache.program)
    name = "decode" if graph.length == 1 else "prefill"
    known = cache.program
    rewrites = pipeline.run_one(name, graph.module, known.spec, known.sites, known.layouts, known.policy)
    counts = known.counts | {name: rewrites}
    program = (
        replace(known, decode=graph.module, counts=counts)
        if name == "decode"
        else replace(known, prefill=graph.module, counts=counts)
    )
    with torch.no_grad():
        run = lower_graph(program, name).run if lower == "inductor" else graph.module
    if name == "decode":
        run = _on_a_copy_of_seen(run)
    return Runner(cache.interface, run, run, chunk=None, cache=cache), graph


def _on_a_copy_of_seen(run: Callable[..., Any]) -> Callable[..., Any]:
    """The decode graph, whose outputs may be views of the positions that it takes from `seen`, which moves on."""

    def decode(ids: Tensor, seen: Tensor, *rest: Tensor) -> Any:
        return run(ids, seen.clone(), *rest)

    return decode


def _told(policy: CachePolicy) -> tuple[str, dict[str, Any]]:
    return policy.name, policy.describe()


def _checked(options: Mapping[str, Any] | None, mode: object) -> tuple[ModelCache, str]:
    if mode is not None:
        raise ConfigError(must('mode with backend="zsmerge"', "left out", repr(mode)))
    given = dict(options or {})
    cache, config, lower = given.pop("cache", None), given.pop("config", None), given.pop("lower", LOWER[0])
    if not isinstance(cache, ModelCache):
        raise ConfigError(must('options["cache"]', "a cache from zs.new_cache", type(cache).__name__, HINT))
    known = cache.program.policy
    same = isinstance(config, ZSMergeConfig | CachePolicy) and _told(policy_of(config)) == _told(known)
    if not same:
        raise ConfigError(must('options["config"]', "the config that the cache was made with", repr(config), HINT))
    if lower not in LOWER:
        raise ConfigError(must('options["lower"]', f"one of {', '.join(LOWER)}", repr(lower)))
    if given:
        raise ConfigError(must("options", "config, cache and lower", f"{sorted(given)} besides"))
    return cache, lower
