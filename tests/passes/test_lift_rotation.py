"""Rotary embedding leaves the graph where positions are counted in the cache, and the numbers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tests.handwritten_spec  # noqa: F401 - registers it
import zsmerge_compile as zs
from tests.graphs import attentions, captured, count
from tests.handwritten import storyteller
from tests.models_zoo import FAMILIES, prompt, tiny
from tests.policies.following import assert_follows, untouched
from zsmerge_compile.errors import ConfigError, InputError, UnsupportedGraphError
from zsmerge_compile.ops import places
from zsmerge_compile.ops.state import Rule
from zsmerge_compile.passes import pipeline
from zsmerge_compile.passes.classify_mask import classify_masks
from zsmerge_compile.passes.lift_rotation import find_rotations, lift_rotation

ROTARY = [name for name in FAMILIES if name != "falcon-rw"]


def found(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """A model, its canonical prefill graph and its sites."""
    model, ctx, graphs = captured(name, dtype=dtype)
    for _, rewrite in pipeline.CANONICALISE:
        rewrite(graphs.prefill, ctx)
    ctx.masks = classify_masks(graphs.prefill, ctx)
    sites = pipeline.find_sites(graphs.prefill, ctx)
    return model, graphs.prefill, find_rotations(graphs.prefill, sites, ctx.spec.max_positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROTARY)
def test_fires_at_every_attention_and_reads_the_frequencies(name: str, dtype: torch.dtype) -> None:
    model, gm, sites = found(name, dtype)
    assert count(gm, "cos") == 1
    assert lift_rotation(gm, sites) == len(attentions(gm)) == 1
    assert count(gm, "cos") == count(gm, "sin") == 0
    rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    torch.testing.assert_close(torch.tensor(sites[0].frequencies), rotary.inv_freq.float(), rtol=0, atol=0)
    assert sites[0].magnitude == pytest.approx(rotary.attention_scaling)


def test_the_lifted_rotation_is_the_models() -> None:
    _, gm, sites = found("llama-yarn")
    (node,) = attentions(gm)
    before = node.args[:2]
    rotated_by_graph = [run(gm, side) for side in before]
    lift_rotation(gm, sites)
    rule = Rule(1, 0, 0.0, 0.0, 1.0, frequencies=torch.tensor(sites[0].frequencies), magnitude=sites[0].magnitude)
    for side, rotated in zip(node.args[:2], rotated_by_graph, strict=True):
        torch.testing.assert_close(places.turned(run(gm, side), torch.arange(9), rule), rotated)


def run(gm: Any, node: Any) -> Tensor:
    """The node's value for a prompt of nine tokens."""
    values: dict[Any, Any] = {}
    given = prompt(1, 9)
    for each in gm.graph.nodes:
        if each.op == "placeholder":
            values[each] = given[each.target]
        elif each.op == "get_attr":
            values[each] = gm.get_parameter(each.target) if "weight" in each.target else gm.get_buffer(each.target)
        elif each.op == "call_function":
            args, kwargs = torch.fx.map_arg((each.args, each.kwargs), lambda used: values[used])
            values[each] = each.target(*args, **kwargs)
        if each is node:
            return values[each].detach()
    raise AssertionError(node)


def test_does_not_fire_with_alibi() -> None:
    _, gm, sites = found("falcon-rw")
    assert lift_rotation(gm, sites) == 0 and sites[0].frequencies is None


def test_other_rotations_are_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match=r"queries and keys must be x \* cos \+ rotate_half"):
        zs.compile(storyteller(), zs.policy("streaming", budget=12), backend="eager")


@pytest.mark.parametrize("policy", ["streaming", "lm_infinite"])
@pytest.mark.parametrize("name", FAMILIES)
def test_with_room_for_all_tokens_it_is_the_untouched_model(name: str, policy: str) -> None:
    model, ids = tiny(name), prompt(1, 20)["input_ids"]
    ours = zs.compile(model, zs.policy(policy, budget=60), backend="eager")
    assert_follows(ours, model, ids, 30)


@pytest.mark.parametrize("name", ["llama-yarn", "llama-gqa", "mistral", "mistral-w8", "falcon-new", "falcon-rw"])
def test_one_layer_sees_sinks_and_recent_tokens_as_a_text_of_their_own(name: str) -> None:
    """With one layer, keys and values depend on their token alone: the kept ones, taken for a text, give the logits."""
    limit = {} if name == "falcon-rw" else {"max_position_embeddings": 48}
    model, ids = tiny(name, num_hidden_layers=1, **limit), prompt(1, 150)["input_ids"]
    ours = zs.compile(model, zs.policy("streaming", budget=12, sinks=3), backend="eager")
    logits = ours.prefill(ids[:, :12])
    for end in range(12, 150):
        kept = ids[:, :end] if end <= 13 else torch.cat([ids[:, :3], ids[:, end - 10 : end]], 1)
        torch.testing.assert_close(logits, untouched(model, kept), rtol=1e-4, atol=1e-4)
        logits = ours.decode(ids[:, end : end + 1])


def test_positions_have_an_end_only_where_they_count() -> None:
    model, ids = tiny("llama-gqa", max_position_embeddings=32), prompt(1, 40)["input_ids"]
    by_place = zs.compile(model, zs.policy("streaming", budget=12), backend="eager")
    with pytest.raises(InputError, match="tokens held and new must be at most 32"):
        by_place.prefill(ids)
    for start in (0, 20):  # 20 at once, then 20 more behind 12 that are held
        by_place.prefill(ids[:, start : start + 20])
    assert by_place.generate(ids[:, :20], max_new_tokens=60, do_sample=False).shape == (1, 80)
    chunked = zs.compile(model, zs.policy("streaming", budget=12, prefill="chunked", chunk=8), backend="eager")
    chunked.prefill(ids)
    large = zs.compile(model, zs.policy("streaming", budget=28, prefill="chunked", chunk=8), backend="eager")
    with pytest.raises(InputError, match="tokens held and new must be at most 32, .* got 36"):
        large.prefill(ids)
    capped = zs.compile(model, zs.policy("lm_infinite", budget=20), backend="eager")
    capped.prefill(ids)
    by_text = zs.compile(model, zs.policy("streaming", budget=12, positions="text"), backend="eager")
    with pytest.raises(InputError, match="tokens seen must be at most 32"):
        by_text.prefill(ids)
    with pytest.raises(ConfigError, match="budget must be below the 32 positions"):
        zs.compile(model, zs.policy("streaming", budget=32), backend="eager")
