"""A model is either described or refused by name."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from tests.models_zoo import FAMILIES, tiny
from zsmerge_compile.errors import UnsupportedModelError
from zsmerge_compile.models import registry
from zsmerge_compile.models.registry import register, spec_for, supported
from zsmerge_compile.models.spec import ModelSpec


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_spec(name: str) -> None:
    spec = spec_for(tiny(name, num_hidden_layers=3))
    window = {"mistral-w8": 8, "mistral-w4096": 4096}.get(name)
    assert spec.name == name.partition("-")[0]
    assert spec.num_layers == 3
    assert spec.vocab_size == 128
    assert spec.max_positions == (None if name == "falcon-rw" else 8192)
    assert spec.windows == (window,) * 3


ROPES = {
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "longrope": dict(
        rope_type="longrope", factor=2.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
        original_max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "falcon-7b"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_that_depends_on_the_length_is_refused(family: str, rope: str) -> None:
    model = tiny(family, num_hidden_layers=1, rope_parameters={"rope_theta": 1e4, **ROPES[rope]})
    with pytest.raises(UnsupportedModelError, match=f"rope_type must be one whose frequencies .* got '{rope}'"):
        spec_for(model)


class _Mine(nn.Linear):
    """A decoder of the user's own, as far as the registry is concerned."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.eval()


def _spec(windows: tuple[int | None, ...] = (None, None)) -> ModelSpec:
    return ModelSpec("mine", 2, 128, None, windows, lambda *_: torch.zeros(1, 128))


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


def test_an_unknown_class_is_refused_with_the_choices(clean: None) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        spec_for(_Mine())
    message = str(raised.value)
    assert message.startswith("model class must be one of FalconForCausalLM, LlamaForCausalLM, MistralForCausalLM, ")
    assert message.endswith("got _Mine")


@pytest.mark.parametrize("key", [_Mine, "_Mine"])
def test_a_class_of_ones_own_can_be_registered(key: Any, clean: None) -> None:
    register(key, lambda model: _spec())
    assert "_Mine" in supported()
    assert spec_for(_Mine()).name == "mine"

    class Derived(_Mine):
        pass

    assert spec_for(Derived()).name == "mine"


def test_a_registration_wins_over_the_built_in_family(clean: None) -> None:
    model = tiny("llama-gqa", num_hidden_layers=1)
    register(type(model), lambda model: _spec())
    assert spec_for(model).name == "mine"


def test_windows_must_be_one_per_layer(clean: None) -> None:
    register(_Mine, lambda model: _spec((None,)))
    with pytest.raises(UnsupportedModelError, match=r"windows must be one per layer \(2\), got 1"):
        spec_for(_Mine())


def _half_quantised(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)


class _Packed(nn.Parameter):
    """A weight subclass, as quantisation libraries make them."""


def _subclassed(model: Any) -> None:
    model.lm_head.weight = _Packed(model.lm_head.weight.data)


SETTINGS = {
    "model must be in eval mode, got training mode": lambda model: model.train(),
    "model must be on one device, got parts on cpu, meta": lambda model: model.lm_head.to("meta"),
    "must be a plain fp32, bf16 or fp16 parameter, got Parameter of torch.float8": _half_quantised,
    "must be a plain fp32, bf16 or fp16 parameter, got _Packed": _subclassed,
    "config.output_attentions must be False": lambda model: setattr(model.config, "output_attentions", True),
    "attn_implementation must be sdpa or eager, got flex_attention": (
        lambda model: model.set_attn_implementation("flex_attention")
    ),
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_no_spec_can_help_with(message: str) -> None:
    attn = "eager" if "output_attentions" in message else "sdpa"
    model = tiny("llama-gqa", attn=attn, num_hidden_layers=1)
    SETTINGS[message](model)
    with pytest.raises(UnsupportedModelError, match=message):
        spec_for(model)


def test_importing_the_registry_imports_no_transformers() -> None:
    code = "import sys; from zsmerge_compile.models import registry; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
