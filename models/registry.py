"""From a model to its spec, or to a refusal that names what is missing."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from zsmerge_compile.errors import UnsupportedModelError, must
from zsmerge_compile.models.spec import ModelSpec

Builder = Callable[[Any], ModelSpec]

# Qualified class name -> module with `spec(model)`. Names, so that importing this file imports no transformers.
_FAMILIES = {
    "transformers.models.llama.modeling_llama.LlamaForCausalLM": "zsmerge_compile.models.llama",
    "transformers.models.mistral.modeling_mistral.MistralForCausalLM": "zsmerge_compile.models.mistral",
    "transformers.models.falcon.modeling_falcon.FalconForCausalLM": "zsmerge_compile.models.falcon",
}
_registered: dict[type | str, Builder] = {}

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register(model_class: type | str, builder: Builder) -> None:
    """Make `compile` accept a class of your own.

    model_class is the class, or its name where the class cannot be imported (remote code). builder gets the model and
    returns its ModelSpec. A registration wins over a built-in family and over an earlier one for the same class.
    """
    _registered[model_class] = builder


def supported() -> tuple[str, ...]:
    """Names of the classes that have a spec, sorted."""
    names = [name.rpartition(".")[2] for name in _FAMILIES]
    names += [key if isinstance(key, str) else key.__name__ for key in _registered]
    return tuple(sorted(set(names)))


def spec_for(model: nn.Module) -> ModelSpec:
    """The spec of `model`, found by its class or the nearest base class that has one.

    Raises UnsupportedModelError when no class matches, and when a setting that concerns every family rules the model
    out: training mode, output_attentions, weights that are quantised or spread over several devices, an attention
    implementation that leaves no attention in the trace.
    """
    builder = next((found for cls in type(model).__mro__ if (found := _builder(cls)) is not None), None)
    if builder is None:
        expected = f"one of {', '.join(supported())}, or registered with zsmerge_compile.models.registry.register"
        raise UnsupportedModelError(must("model class", expected, type(model).__name__))
    _refuse_settings(model)
    spec = builder(model)
    if len(spec.windows) != spec.num_layers:
        raise UnsupportedModelError(must("ModelSpec.windows", f"one per layer ({spec.num_layers})", len(spec.windows)))
    return spec


def _builder(cls: type) -> Builder | None:
    registered = _registered.get(cls) or _registered.get(cls.__name__)
    if registered is not None:
        return registered
    family = _FAMILIES.get(f"{cls.__module__}.{cls.__name__}")
    if family is None:
        return None
    builder: Builder = import_module(family).spec
    return builder


def _refuse_settings(model: nn.Module) -> None:
    """Settings that no spec can help with, each refused by name."""
    if any(module.training for module in model.modules()):
        raise UnsupportedModelError(must("model", "in eval mode", "training mode", "call model.eval() first"))
    devices = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if len(devices) > 1 or "meta" in devices or "disk" in set((getattr(model, "hf_device_map", None) or {}).values()):
        raise UnsupportedModelError(must("model", "on one device", f"parts on {', '.join(devices)} (device_map)"))
    for name, parameter in model.named_parameters():
        plain = type(parameter) in (nn.Parameter, nn.Buffer)
        if not plain or parameter.dtype not in DTYPES:
            got = f"{type(parameter).__name__} of {parameter.dtype}"
            hint = "quantised weights have no support"
            raise UnsupportedModelError(must(f"weight {name}", "a plain fp32, bf16 or fp16 parameter", got, hint))
    config = getattr(model, "config", None)
    if getattr(config, "output_attentions", False):
        raise UnsupportedModelError(must("config.output_attentions", "False", "True"))
    attention = getattr(config, "_attn_implementation", None)
    if attention is not None and attention not in ATTENTION_IMPLEMENTATIONS:
        expected = " or ".join(ATTENTION_IMPLEMENTATIONS)
        raise UnsupportedModelError(must("attn_implementation", expected, attention))
