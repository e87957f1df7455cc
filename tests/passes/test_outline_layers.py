"""Layers that are alike share a body, others do not, and the numbers stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import zsmerge_compile as zs
from tests.models_zoo import FAMILIES, VOCAB, prompt, tiny
from zsmerge_compile.lower import inductor
from zsmerge_compile.lower.expand import annotated
from zsmerge_compile.lower.stages import Stages
from zsmerge_compile.passes.outline_layers import crossing, outline_layers
from zsmerge_compile.program import Program

LAYERS = 4


def program(model: Any, budget: Any = 12) -> Program:
    return zs.compile(model, zs.ZSMergeConfig(budget, residual=2), batch_size=3, backend="eager").program


def outlined(program: Program, name: str) -> tuple[fx.GraphModule, fx.GraphModule | None]:
    """The flat graph and the outlined one."""
    op = program.policy.decode_op if name == "decode" else program.policy.extend_op
    inputs = inductor.decode_inputs(program) if name == "decode" else inductor.prefill_inputs(program)
    flat = annotated(getattr(program, name), inputs)
    return flat, outline_layers(flat, op)


def calls(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.find_nodes(op="call_module")]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_body_for_all_layers_of_a_family(name: str) -> None:
    made = program(tiny(name, num_hidden_layers=LAYERS))
    for graph in ("decode", "prefill"):
        _, result = outlined(made, graph)
        assert result is not None
        assert calls(result) == ["head", *["body_0"] * LAYERS, "tail"]


def test_layers_of_eager_attention_share_a_body() -> None:
    _, result = outlined(program(tiny("llama-gqa", attn="eager", num_hidden_layers=LAYERS)), "prefill")
    assert result is not None and calls(result) == ["head", *["body_0"] * LAYERS, "tail"]


@settings(max_examples=5, deadline=None)
@given(budgets=st.lists(st.sampled_from([8, 12, 16]), min_size=2, max_size=5))
def test_a_body_for_each_budget(budgets: list[int]) -> None:
    _, result = outlined(program(tiny("llama-gqa", num_hidden_layers=len(budgets)), budgets), "decode")
    assert result is not None
    order = list(dict.fromkeys(budgets))
    assert calls(result) == ["head", *(f"body_{order.index(budget)}" for budget in budgets), "tail"]


def test_a_layer_whose_weights_are_tied_gets_its_own_body() -> None:
    """A compiled graph may take two inputs that were one tensor for one tensor for ever."""
    model = tiny("llama-gqa", num_hidden_layers=3)
    tied = model.model.layers[1].mlp
    tied.up_proj.weight = tied.gate_proj.weight
    _, result = outlined(program(model), "decode")
    assert result is not None and calls(result) == ["head", "body_0", "body_1", "body_0", "tail"]


def test_a_layer_with_another_constant_gets_its_own_body() -> None:
    model = tiny("llama-gqa", num_hidden_layers=3)
    model.model.layers[2].post_attention_layernorm.variance_epsilon = 1e-3
    _, result = outlined(program(model), "decode")
    assert result is not None and calls(result) == ["head", "body_0", "body_0", "body_1", "tail"]


def test_does_not_fire_on_one_layer() -> None:
    assert outlined(program(tiny("llama-gqa", num_hidden_layers=1)), "decode")[1] is None


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-w8", "falcon-7b", "falcon-new", "falcon-rw"])
def test_same_numbers(name: str) -> None:
    """Prefill with padding, then steps with pauses, part by part as compiled code would be called."""
    made = program(tiny(name, num_hidden_layers=3), [12, 16, 12])
    state = [tensor for layer in made.allocate() for tensor in layer]
    other = [tensor.clone() for tensor in state]
    x = prompt(3, 20, pads=(0, 5, 19))
    pads, seen, rows = torch.tensor([0, 5, 19]), torch.zeros(3, dtype=torch.int64), torch.tensor([2, 0, 1])
    given = (x["input_ids"], x["position_ids"], rows, seen, pads)
    assert_same(*outlined(made, "prefill"), given, state, other)
    seen[rows] = 20 - pads
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        active = torch.rand(3, generator=generator) < 0.7
        ids = torch.randint(VOCAB, (3, 1), generator=generator)
        assert_same(*outlined(made, "decode"), (ids, seen, active), state, other)
        seen += active


@torch.no_grad()
def assert_same(
    flat: fx.GraphModule, parted: fx.GraphModule | None, given: Any, state: list[Tensor], other: list[Tensor]
) -> None:
    assert parted is not None
    stages = Stages(parted, {name: parted.get_submodule(name) for name in calls(parted)})
    expected, got = flat(*given, *state), stages(*given, *other)
    assert torch.equal(expected, got)
    assert all(torch.equal(one, two) for one, two in zip(state, other, strict=True))


def test_crossing_counts_values_alive_at_each_place() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.neg, (x,))
    b = graph.call_function(torch.neg, (a,))
    c = graph.call_function(torch.add, (a, b))
    d = graph.call_function(torch.add, (c, c))
    graph.output(d)
    assert crossing([a, b, c, d]) == [0, 1, 2, 1, 1]


def test_values_are_let_go_when_the_last_part_has_read_them() -> None:
    """Otherwise a prompt's hidden states of every layer would be held at once."""
    made = program(tiny("llama-gqa", num_hidden_layers=5))
    _, result = outlined(made, "decode")
    assert result is not None
    stages = Stages(result, {name: result.get_submodule(name) for name in calls(result)})
    alive, most = set(), 0
    for stage in stages._stages:
        alive = (alive | set(stage.gives)) - set(stage.frees)
        most = max(most, len(alive))
    assert most <= 3 + 1 and len(alive) == 1, "hidden, cos and sin; at the end the logits"


@pytest.mark.parametrize(("layers", "parts"), [(3, 1), (4, 3)])
def test_outlined_by_default_from_some_depth_on(layers: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the report says so: one graph, or the first layer's, the others' and the head's."""
    monkeypatch.setattr(inductor, "DEEP_ELSEWHERE", 4)
    monkeypatch.setattr(inductor, "compile_graph", lambda gm, inputs: gm)
    report = zs.compile(tiny("llama-gqa", num_hidden_layers=layers), zs.ZSMergeConfig(8)).report
    assert report.parts == {"prefill": parts, "decode": parts}


def test_outline_is_for_inductor() -> None:
    with pytest.raises(zs.ZSMergeError, match="outline must be None"):
        zs.compile(tiny("llama-gqa"), zs.ZSMergeConfig(8), backend="eager", outline=True)
