"""From a transformers model to a compiled one: the only file that knows the order of the steps."""

from __future__ import annotations

import time
from importlib import import_module

from torch import nn

from zsmerge_compile.capture import capture
from zsmerge_compile.config import ZSMergeConfig
from zsmerge_compile.dynamo.cache import ModelCache
from zsmerge_compile.errors import ConfigError, InputError, MissingBackendError, must
from zsmerge_compile.lower import tensorrt_needs
from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.models.registry import spec_for
from zsmerge_compile.ops.places import BOUNDED
from zsmerge_compile.ops.policy import CachePolicy
from zsmerge_compile.passes import pipeline
from zsmerge_compile.policies import policy_of
from zsmerge_compile.program import Program
from zsmerge_compile.runtime.model import CompiledModel
from zsmerge_compile.runtime.report import Report

BACKENDS = ("eager", "inductor", "tensorrt")


def compile(
    model: nn.Module,
    config: ZSMergeConfig | CachePolicy,
    batch_size: int = 1,
    backend: str = "inductor",
    *,
    check_nan: bool = False,
    outline: bool | None = None,
    segments: int | None = None,
) -> CompiledModel:
    """Compile a causal LM with a cache of `config.budget` slots per key/value head and layer.

    model       LLaMA, Mistral or Falcon from transformers, or any class with a registered spec; in eval mode. It is
                neither copied nor changed: the result runs on its parameters (a TensorRT engine on copies of them).
    config      a `ZSMergeConfig`, or any policy from `zsmerge_compile.policy(name, ...)`
    batch_size  rows of the cache; each has its own length and can be reset and refilled alone
    backend     "inductor" (compiled), "eager" (the reference, node by node) or "tensorrt" (steps by a
                TensorRT engine, prompts by Inductor; needs an NVIDIA GPU and zsmerge-compile[tensorrt]; not run yet)
    check_nan   look for NaN in all logits (costs a synchronisation per call on a GPU)
    outline     "inductor" only: compile layers that are alike once, so that compile time hardly grows with the depth;
                None decides by the number of layers
    segments    "tensorrt" only: engines and parts in PyTorch that a step may be cut into where TensorRT does not take
                an operator; None: 1, so that such an operator is an error

    Raises ConfigError, UnsupportedModelError, UnsupportedGraphError, UnsupportedMaskError or MissingBackendError.
    """
    started = time.perf_counter()
    _check_model(model, config, batch_size)
    _check_backend(model, backend, outline, segments)
    program = _program(model, config, batch_size)
    options = {name: given for name, given in (("outline", outline), ("segments", segments)) if given is not None}
    lowered: Lowered = import_module(f"zsmerge_compile.lower.{backend}").lower(program, **options)
    report = Report(
        model=type(model).__name__,
        policy=program.policy.name,
        backend=backend,
        batch_size=batch_size,
        passes=program.counts,
        sites=program.sites,
        layouts=program.layouts,
        cache_bytes=sum(tensor.nbytes for layer in program.allocate() for tensor in layer)
        + getattr(lowered.decode, "spare_bytes", 0),
        compile_seconds=time.perf_counter() - started,
        kernels=lowered.kernels,
        parts=lowered.parts,
    )
    return CompiledModel(model, program, lowered, report, program.policy.chunk, check_nan)


def new_cache(model: nn.Module, config: ZSMergeConfig | CachePolicy, batch_size: int = 1) -> ModelCache:
    """An empty cache for `torch.compile(model, backend="zsmerge", options=options, fullgraph=True)`, with options =
    {"config": config, "cache": cache}.

    The graphs that Dynamo hands over for prompts and for tokens share it; the caller resets, inspects, saves and loads
    it. The model is traced once here, which finds what every layer's cache must hold. Dynamo compiles one code object
    8 times (torch._dynamo.config.recompile_limit): raise that, or call torch._dynamo.reset(), for more caches.

    Arguments and errors are those of `compile`; ConfigError too for config.prefill="chunked", as it is the caller who
    cuts the prompt there.
    """
    _check_model(model, config, batch_size)
    if policy_of(config).chunk is not None:
        hint = "call the model with one piece of the prompt after the other instead"
        raise ConfigError(must("config.prefill", '"full" with torch.compile', '"chunked"', hint))
    return ModelCache(_program(model, config, batch_size))


def _program(model: nn.Module, config: ZSMergeConfig | CachePolicy, batch_size: int) -> Program:
    spec = spec_for(model)
    policy = policy_of(config)
    budgets = policy.budgets(spec.num_layers)  # what is wrong with them is told before the trace
    if policy.places in BOUNDED and spec.max_positions is not None and max(budgets) >= spec.max_positions:
        raise ConfigError(must("budget", f"below the {spec.max_positions} positions of the model", max(budgets)))
    captured = capture(model, spec, batch_size)
    rewritten = pipeline.run(captured.prefill, captured.decode, spec, policy)
    parameter = next(model.parameters())
    return Program(
        **rewritten._asdict(),
        spec=spec,
        policy=policy,
        batch_size=batch_size,
        dtype=parameter.dtype,
        device=parameter.device,
    )


def _check_model(model: object, config: object, batch_size: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(must("model", "a torch.nn.Module", type(model).__name__))
    if not isinstance(config, ZSMergeConfig | CachePolicy):
        hint = 'zs.ZSMergeConfig(budget=1024), or zs.policy("h2o", budget=1024)'
        raise ConfigError(must("config", "a ZSMergeConfig or a policy", type(config).__name__, hint))
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(must("batch_size", "an integer of at least 1", repr(batch_size)))


def _check_backend(model: nn.Module, backend: object, outline: object, segments: object) -> None:
    if backend not in BACKENDS:
        raise MissingBackendError(must("backend", f"one of {', '.join(BACKENDS)}", repr(backend)))
    if outline not in (None, True, False) or (outline is not None and backend != "inductor"):
        raise ConfigError(must("outline", 'None, or True or False with backend="inductor"', repr(outline)))
    counted = isinstance(segments, int) and not isinstance(segments, bool) and segments >= 1
    if segments is not None and not (counted and backend == "tensorrt"):
        raise ConfigError(must("segments", 'None, or a number of at least 1 with backend="tensorrt"', repr(segments)))
    if backend == "tensorrt":
        tensorrt_needs.require()
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise InputError(must("model", 'on the GPU with backend="tensorrt"', f"on {device}", "model.cuda()"))
