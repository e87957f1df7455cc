"""Of the same prompt on the same weights our caches keep the tokens that kvpress 0.5.5 keeps: every layer, every head.

`kvpress_kept.json` is what kvpress kept, in an environment of its own; `tools/kvpress_fixtures` makes it again. Every
comparison is of whole sets. No case has a near-tie, so none is forgiven: where the last token kept and the best one
lost have scores within MARGIN of each other (a share of the former), the maker refuses to write, and the tests that
derive what must stay from kvpress's scores fail. H2O's own scores must be within CLOSE of kvpress's, a quarter of it.

StreamingLLMPress   the same.
SnapKVPress         the mean over queries and over the heads of a group, where ours is the sum: the same order. It
                    pools by mean only; for "max" the expectation is the maximum of its scores before pooling. Its
                    default window is 64, ours the published 32. Without eager attention it computes the window's
                    attention again and leaves out a sliding window; these prompts are shorter than Mistral's.
PyramidKVPress      counts the observation window among the slots that the pyramid spreads, where the published code
                    spreads budget - window and adds the window to every layer, and has no rounding down. The same
                    budget and beta thus give other counts; `pyramid` gives the beta of ours that has its. It caps
                    the first layer at prompt - window slots, where the published code caps at the prompt, and gives
                    every layer the budget before; `pyramid` gives a list of budgets then.
ObservedAttention-  no recent tokens are protected, and a score is the mean over the queries that could see the token:
Press               new tokens gain, as the mean is over few queries. That is not H2O. What must stay is derived from
                    its score of every token: times the queries that could see it, the newest `recent` set apart.

Only the choice after a prompt at batch 1 is compared: what follows, kvpress's caches keep without choosing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import zsmerge_compile as zs
from zsmerge_compile.cli.demo import ASSETS as LLAMA

GIVEN: dict[str, Any] = json.loads(Path(__file__).with_name("kvpress_kept.json").read_text())
MARGIN: float = GIVEN["margin"]
CLOSE = MARGIN / 4  # of a score
FAMILIES = ("llama", "mistral")
PROMPTS = (0, 1, 2)
RECENT = (60, 1, 70)  # of H2O, by prompt; near-ties are common between its sums, and with these there is none
GROUP = 2  # query heads per key/value head
Kept = list[list[list[int]]]  # [layers][key/value heads][tokens]: positions in order


@cache
def model(family: str) -> Any:
    folder = LLAMA.with_name(f"{family}-stdlib")
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights == GIVEN["weights"][family], f"{family} is not the model kvpress was given: tools/kvpress_fixtures"
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def cases(*presses: str) -> list[Any]:
    told = [case for case in GIVEN["cases"] if case["press"] in presses]
    return [pytest.param(case, id=f"{case['family']}-{case['press']}-{case['budget']}") for case in told]


def find(family: str, press: str, prompt: int, **settings: int) -> dict[str, Any]:
    """The case whose settings include these."""
    wanted = {"family": family, "press": press, "prompt": prompt}
    (found,) = (c for c in GIVEN["cases"] if wanted.items() <= c.items() and settings.items() <= c["settings"].items())
    return found


def scores_of(case: dict[str, Any]) -> Tensor:
    """kvpress's scores [layers, G, n], fp32 as written."""
    layers = [torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32) for text in case["scores"]]
    return torch.stack(layers).view(len(layers), len(case["kept"][0]), -1).double()


def same(case: dict[str, Any]) -> dict[str, Any]:
    """The policy that is the same as the case's press."""
    budget, settings = case["budget"], case["settings"]
    if case["press"] == "StreamingLLMPress":
        return {"name": "streaming", "budget": budget, "sinks": settings["n_sink"]}
    window, kernel = settings["window_size"], settings["kernel_size"]
    given = {"budget": budget, "window": window, "kernel": kernel, "pooling": "avg"}
    if case["press"] == "SnapKVPress":
        return {"name": "snapkv"} | given
    return {"name": "pyramidkv"} | given | pyramid(budget, window, settings["beta"], case["prompt"], len(case["kept"]))


def pyramid(budget: int, window: int, beta: int, prompt: int, layers: int) -> dict[str, Any]:
    """What ours is told, so that its last layer has kvpress's budget / beta slots: the window is among them there."""
    room = len(GIVEN["prompts"][prompt]) - window
    if 2 * budget - budget // beta >= room:
        least = 2 * budget - room
        return {"budget": [round(room - layer * (room - least) / (layers - 1)) for layer in range(layers)]}
    return {"beta": (budget - window) // (budget // beta - window)}


def filled(family: str, prompt: int, policy: dict[str, Any]) -> Any:
    """Our cache after the prompt."""
    compiled = zs.compile(model(family), zs.policy(**policy), backend="eager")
    compiled.prefill(torch.tensor([GIVEN["prompts"][prompt]]))
    return compiled.cache


def kept(cache: Any) -> Kept:
    def positions(layer: Any, head: int) -> list[int]:
        return sorted(layer.position[0, head][layer.weight[0, head] > 0].tolist())

    return [[positions(layer, head) for head in range(layer.weight.shape[1])] for layer in cache.layers]


def best(scores: Tensor, count: int, newest: int) -> list[int]:
    """The `count` best of scores [n], and the `newest` tokens behind; of equals the older goes.

    Fails where the border is a near-tie: summed in another order, its scores might be the other way round.
    """
    values, end = scores.tolist(), len(scores)
    ranked = sorted(range(end), key=lambda at: (values[at], at), reverse=True)
    last, lost = values[ranked[count - 1]], values[ranked[count]]
    rivals = [lost] if last != lost else [value for value in values if value != last]
    assert min(abs(value - last) for value in rivals) > MARGIN * last
    return sorted(ranked[:count]) + list(range(end, end + newest))


@pytest.mark.parametrize("case", cases("StreamingLLMPress", "SnapKVPress", "PyramidKVPress"))
def test_same_tokens_as_kvpress(case: dict[str, Any]) -> None:
    assert case["margin"] >= MARGIN
    assert kept(filled(case["family"], case["prompt"], same(case))) == case["kept"]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_h2o_keeps_what_kvpress_scores_say(family: str, prompt: int) -> None:
    """Behind the newest `recent` tokens the sum of kvpress's attention decides, and our scores are that sum.

    By its means, as they are, kvpress keeps what it says it keeps: in every layer and head other tokens than H2O.
    """
    case = find(family, "ObservedAttentionPress", prompt)
    means = scores_of(case)
    assert [[best(head, case["budget"], 0) for head in layer] for layer in means] == case["kept"]
    n, budget, recent = means.shape[2], case["budget"], RECENT[prompt]
    sums = means * torch.arange(n, 0, -1) * GROUP
    expected = [[best(head[: n - recent], budget - recent, recent) for head in layer] for layer in sums]
    held = filled(family, prompt, {"name": "h2o", "budget": budget, "recent": recent})
    assert kept(held) == expected
    assert all(ours != theirs for ours, theirs in zip(sum(expected, []), sum(case["kept"], []), strict=True))
    for layer, theirs in zip(held.layers, sums, strict=True):
        ours = layer.score[0][layer.weight[0] > 0].view(len(theirs), budget).double()
        at = layer.position[0][layer.weight[0] > 0].view(len(theirs), budget).long()
        torch.testing.assert_close(ours, theirs.gather(1, at), rtol=CLOSE, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_maximum_over_neighbours(name: str, family: str) -> None:
    """kvpress has no such pooling: the maximum is taken of its scores with a kernel of one token."""
    case = find(family, "SnapKVPress", 1, kernel_size=1)
    window, kernel = case["settings"]["window_size"], 7
    given = {"name": name, "budget": 100, "window": window, "kernel": kernel, "pooling": "max"}
    pooled = functional.max_pool1d(scores_of(case)[..., :-window], kernel, 1, kernel // 2)
    counts = [100] * len(pooled) if name == "snapkv" else zs.policy(**given).budgets(len(pooled))
    expected = [[best(head, n - window, window) for head in layer] for layer, n in zip(pooled, counts, strict=True)]
    assert kept(filled(family, 1, given)) == expected


@pytest.mark.parametrize(
    "press, changed",
    [
        ("StreamingLLMPress", {"sinks": 5}),
        ("SnapKVPress", {"budget": 99}),
        ("SnapKVPress", {"kernel": 3}),
        ("SnapKVPress", {"window": 31}),
        ("SnapKVPress", {"pooling": "max"}),
        ("PyramidKVPress", {"budget": 160}),  # by the formula, which does not know the prompt's length
    ],
)
def test_other_parameters_keep_other_tokens(press: str, changed: dict[str, Any]) -> None:
    """What the comparisons above would say of a policy that is a little different."""
    case = find("llama", press, 0)
    assert kept(filled("llama", 0, same(case) | changed)) != case["kept"]


def test_a_near_tie_is_no_answer() -> None:
    scores = torch.tensor([3.0, 1.0, 1.0 + MARGIN / 2, 2.0])
    assert best(scores, 2, 1) == [0, 3, 4]
    with pytest.raises(AssertionError):
        best(scores, 3, 0)
    assert best(torch.tensor([2.0, 1.0, 1.0]), 2, 0) == [0, 2]


def test_every_press_and_prompt_was_asked_of_every_model() -> None:
    asked = {(case["family"], case["press"], case["prompt"]) for case in GIVEN["cases"]}
    presses = ("StreamingLLMPress", "SnapKVPress", "PyramidKVPress", "ObservedAttentionPress")
    assert asked == set(product(FAMILIES, presses, PROMPTS))
