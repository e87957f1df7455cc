"""What the backend cannot serve is refused with the reason and the way out, and the cache stays as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zsmerge_compile as zs
from tests.dynamo.made import CONFIG, pair
from tests.models_zoo import prompt, tiny

pytestmark = pytest.mark.filterwarnings("ignore:fullgraph should be True")
B3 = dict(prompt(3, 12), use_cache=False)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """Our own error, inside Dynamo's where the graph is refused."""
    with torch.no_grad(), pytest.raises(Exception) as caught:
        yield
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, zs.ZSMergeError), repr(error)
    for word in words:
        assert re.search(word, str(error)), str(error)


def compiled(model: Any, cache: Any, config: Any = CONFIG, **options: Any) -> Any:
    torch._dynamo.reset()
    given = {"config": config, "cache": cache, "lower": "eager", **options}
    return torch.compile(model, backend="zsmerge", options=given, fullgraph=True)


def test_options() -> None:
    model = tiny("llama-gqa")
    cache = zs.new_cache(model, CONFIG, 3)
    torch._dynamo.reset()
    with refused(r"options\[\"cache\"\] must be a cache from zs.new_cache, got NoneType", "zs.new_cache"):
        torch.compile(model, backend="zsmerge", fullgraph=True)(**B3)
    with refused(r"options\[\"config\"\] must be the config that the cache was made with"):
        compiled(model, cache, zs.ZSMergeConfig(13))(**B3)
    with refused(r"options\[\"config\"\] must be", "None"):
        compiled(model, cache, None)(**B3)
    with refused(r"options\[\"lower\"\] must be one of inductor, eager, got 'tensorrt'"):
        compiled(model, cache, lower="tensorrt")(**B3)
    with refused("options must be config, cache and lower, got .'budget'. besides"):
        compiled(model, cache, budget=3)(**B3)
    torch._dynamo.reset()
    with refused('mode with backend="zsmerge" must be left out'):
        torch.compile(model, backend="zsmerge", mode="max-autotune", fullgraph=True)(**B3)


def test_new_cache_refuses_what_compile_refuses() -> None:
    with pytest.raises(zs.ZSMergeError, match='config.prefill must be "full" with torch.compile, got "chunked"'):
        zs.new_cache(tiny("llama-gqa"), zs.ZSMergeConfig(12, prefill="chunked"))
    with pytest.raises(zs.ZSMergeError, match="model must be in eval mode"):
        zs.new_cache(tiny("llama-gqa").train(), CONFIG)
    with pytest.raises(zs.ZSMergeError, match="batch_size must be"):
        zs.new_cache(tiny("llama-gqa"), CONFIG, 0)
    with pytest.raises(zs.ZSMergeError, match="model class must be"):
        zs.new_cache(nn.Linear(2, 2), CONFIG)


def test_keys_and_values_that_leave_or_enter() -> None:
    model = tiny("llama-gqa")
    cache = zs.new_cache(model, CONFIG, 3)
    fast = compiled(model, cache)
    with refused("outputs of the graph must be without keys and values, got a key of layer 0", "pass use_cache=False"):
        fast(**prompt(3, 12))
    with torch.no_grad():
        past = model(**prompt(3, 12)).past_key_values
    token, position = torch.full((3, 1), 5), torch.full((3, 1), 12)
    with refused("past_key_values", "must be token ids, a mask or positions, got keys, values", "use_cache=False"):
        fast(token, position_ids=position, past_key_values=past)


def test_a_model_that_counts_its_own_positions() -> None:
    for name in ("llama-gqa", "falcon-7b", "falcon-rw"):
        model = tiny(name)
        fast = compiled(model, zs.new_cache(model, CONFIG, 3))
        given = {name: value for name, value in B3.items() if name != "position_ids"}
        with refused("position_ids must be an input of the graph", "from 0 in every call", "pass position_ids"):
            fast(**given)


def sharing(name: str, model: Any, **fields: Any) -> Any:
    """Another model with one weight of `model`."""
    other = tiny(name, **fields)
    other.lm_head = model.lm_head
    return other


def test_a_graph_without_the_models_attention() -> None:
    model = tiny("llama-gqa")
    cache = zs.new_cache(model, CONFIG, 3)
    with refused("L.'x'. of the graph must be token ids, a mask or positions, .* got torch.float32", "whole model"):
        compiled(model.model.layers[0].mlp, cache)(torch.zeros(3, 4, 32))
    with refused("attentions found in the graph must be 2, one per layer of the model that the cache is for, got 0"):
        compiled(model.model.embed_tokens, cache)(B3["input_ids"])
    with refused("attentions found in the graph must be 2, .* got 3"):
        compiled(sharing("llama-gqa", model, num_hidden_layers=3), cache)(**B3)


def test_another_model_than_the_caches() -> None:
    model = tiny("llama-gqa")
    cache = zs.new_cache(model, CONFIG, 3)
    for other in (tiny("llama-gqa"), tiny("llama-gqa", torch.bfloat16), tiny("mistral")):
        with refused("weights of the graph must be those of the cache's model, got none of them", "make a cache"):
            compiled(other, cache)(**B3)
    with refused("kv_heads of layer 0 must be 2, as in the model that the cache is for, got 4"):
        compiled(sharing("llama-mha", model), cache)(**B3)
    windowed = tiny("mistral-w8")
    with refused("attention mask of layer 0 must be .*window=8.*, as in the model's own trace, got another"):
        compiled(sharing("mistral", windowed), zs.new_cache(windowed, CONFIG, 3))(**B3)
    sloping = tiny("falcon-rw")
    with refused("attention mask of layer 0 must be .*slopes=.*, as in the model's own trace, got another"):
        compiled(sharing("falcon-rw", sloping, alibi=False), zs.new_cache(sloping, CONFIG, 3))(**B3)


def test_autocast() -> None:
    model = tiny("llama-gqa")
    fast = compiled(model, zs.new_cache(model, CONFIG, 3))
    with (
        refused("(key|value) of layer 0 must be torch.float32 as the cache, got torch.bfloat16"),
        torch.autocast("cpu"),
    ):
        fast(**B3)


def test_shapes() -> None:
    model = tiny("llama-gqa")
    cache = zs.new_cache(model, CONFIG, 3)
    fast = compiled(model, cache)
    with refused("rows of the graph must be 3, as in the cache, got 2"):
        fast(**prompt(2, 12), use_cache=False)
    with refused("position_ids.* must be of shape .3, 12. like the others, got .1, 12.", "columns of this call"):
        fast(**{**B3, "position_ids": torch.arange(12)[None]})
    with refused("must be token ids, a mask or positions, got keys, values or a 4D mask"):
        fast(**{**B3, "attention_mask": torch.zeros(3, 1, 12, 12)})
    embedded = {name: value for name, value in B3.items() if name != "input_ids"}
    with refused("inputs_embeds.* must be token ids, a mask or positions, .* got torch.float32"):
        fast(inputs_embeds=torch.zeros(3, 12, 32), **embedded)
    with refused("input L.*labels.* must be one of|inputs .B, T. of the graph must be of"):
        fast(**B3, labels=B3["input_ids"].clone())
    assert cache.seen_tokens.tolist() == [0, 0, 0] and not cache.broken_rows()


def test_calls_that_are_refused_leave_the_cache_as_it_was() -> None:
    both = pair("llama-gqa", 3)
    both.prompt(20)
    before = [tensor.clone() for tensor in (both.cache.seen_tokens, *both.cache.flat)]
    again, token = prompt(3, 20), torch.full((3, 1), 5)
    seen = both.cache.seen_tokens[:, None]
    with refused("position_ids of row 0 must be counted on from the 20 tokens", r"cache.reset\(\) before a new prompt"):
        both.ours(**again, use_cache=False)
    with refused("position_ids of row 2 must be counted on from the 9 tokens"):
        both.ours(token, position_ids=seen + torch.tensor([[0], [0], [1]]), use_cache=False)
    with refused("token_ids must be in 0"):
        both.ours(token + 1000, position_ids=seen.clone(), use_cache=False)
    with refused("padding must be on the left"):
        mask = torch.ones(3, 20, dtype=torch.int64)
        mask[:, -1] = 0
        positions = seen + torch.arange(20)
        both.ours(again["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False)
    with refused("gradient mode must be off", "torch.inference_mode"), torch.enable_grad():
        both.ours(token, position_ids=seen.clone(), use_cache=False)
    after = (both.cache.seen_tokens, *both.cache.flat)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_weights_assigned_anew() -> None:
    both = pair("llama-gqa", 1)
    both.prompt(12)
    both.model.lm_head.weight = nn.Parameter(both.model.lm_head.weight.detach().clone())
    both.reset()
    with refused("weights and constants of the model must be those that were compiled", r"torch._dynamo.reset\(\)"):
        both.prompt(12)


def test_a_call_that_breaks_midway_marks_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair("llama-gqa", 3)
    both.prompt(12)

    def broken(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    token, position = torch.full((3, 1), 5), both.cache.seen_tokens[:, None].clone()
    both.token(token)
    monkeypatch.setattr(torch.fx.GraphModule, "__call__", broken)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        both.ours(token, position_ids=position + 1, use_cache=False)
    monkeypatch.undo()
    with refused("must be valid", r"reset\(rows"):
        both.ours(token, position_ids=position + 1, use_cache=False)
    both.reset()
    both.prompt(12)


def test_a_function_that_cuts_or_joins_tokens() -> None:
    """Which tokens attend is what the cache counts; the arguments of the call would say otherwise."""
    model = tiny("llama-gqa")
    cache = zs.new_cache(model, CONFIG, 1)
    ids, positions = prompt(1, 12)["input_ids"], torch.arange(12)[None]

    def run(change: Any) -> Any:
        def changed(tokens: Tensor, where: Tensor) -> Tensor:
            logits: Tensor = model(change(tokens), position_ids=change(where), use_cache=False).logits
            return logits

        return compiled(changed, cache)

    for change in (lambda t: t[:, :-1], lambda t: t[:, -1:], lambda t: torch.cat([t, t], 1), lambda t: t.repeat(2, 1)):
        with refused("tokens that attend in layer 0 must be the inputs' .1, 12., got .", "before the call"):
            run(change)(ids, positions)
    with refused("tokens that attend in layer 0 must be the inputs' .1, 1., got .1, 2."):
        run(lambda t: torch.cat([t, t], 1))(ids[:, :1], positions[:, :1])


def test_a_mask_that_means_the_opposite() -> None:
    model = tiny("llama-gqa")

    def opposite(tokens: Tensor, padding: Tensor, where: Tensor) -> Tensor:
        logits: Tensor = model(tokens, attention_mask=1 - padding, position_ids=where, use_cache=False).logits
        return logits

    fast = compiled(opposite, zs.new_cache(model, CONFIG, 3))
    with refused("attention mask of layer 0 must be"):
        fast(B3["input_ids"], torch.zeros(3, 12, dtype=torch.int64), B3["position_ids"])
    with refused("attention mask of layer 0 must be"):
        fast(B3["input_ids"][:, :1], torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64))


def test_options_changed_afterwards() -> None:
    """Dynamo tells compiled functions apart by their options, and would run the one that has the first cache."""
    model = tiny("llama-gqa")
    first, second = zs.new_cache(model, CONFIG, 3), zs.new_cache(model, CONFIG, 3)
    options = {"config": CONFIG, "cache": first, "lower": "eager"}
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="zsmerge", options=options, fullgraph=True)(**B3)
    first.reset()
    options["cache"] = second
    with refused(r"options\[\"cache\"\] must be the cache that was compiled for, got another", "a dict of its own"):
        torch.compile(model, backend="zsmerge", options=options, fullgraph=True)(**B3)
    assert first.seen_tokens.tolist() == [0, 0, 0]


def test_without_fullgraph() -> None:
    """Past its recompile limit Dynamo would run the original model without the cache."""
    model = tiny("llama-gqa")
    options = {"config": CONFIG, "cache": zs.new_cache(model, CONFIG, 3), "lower": "eager"}
    torch._dynamo.reset()
    with refused('fullgraph with backend="zsmerge" must be True, got False', "fullgraph=True"):
        torch.compile(model, backend="zsmerge", options=options)(**B3)


def test_more_caches_than_dynamo_compiles_for() -> None:
    model = tiny("llama-gqa")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for number in range(2):
            cache = zs.new_cache(model, CONFIG, 3)
            options = {"config": CONFIG, "cache": cache, "lower": "eager"}
            fast = torch.compile(model, backend="zsmerge", options=options, fullgraph=True)
            if number == 0:
                fast(**B3)
                continue
            with pytest.raises(Exception, match="fullgraph=True"):
                fast(**B3)
            assert cache.seen_tokens.tolist() == [0, 0, 0]
