"""A tiny model under torch.compile(backend="zsmerge"), and the same under zs.compile, which says what is right."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

import zsmerge_compile as zs
from tests.models_zoo import prompt, tiny
from tests.states import assert_same_slots, residuals, singles
from zsmerge_compile.ops.state import State

CONFIG = zs.ZSMergeConfig(12, residual=3)
PADS = (0, 5, 11)


class Pair:
    """ours and theirs are fed alike; `prompt` and `token` return the logits of both."""

    def __init__(self, model: Any, batch: int, lower: str = "eager", **compile_options: Any) -> None:
        self.batch, self.model = batch, model
        self.cache = zs.new_cache(model, CONFIG, batch)
        options = {"config": CONFIG, "cache": self.cache, "lower": lower}
        self.ours = torch.compile(model, backend="zsmerge", options=options, fullgraph=True, **compile_options)
        self.theirs = zs.compile(model, CONFIG, batch, backend="eager")

    def reset(self, rows: list[int] | None = None) -> None:
        self.cache.reset(rows)
        self.theirs.reset(rows)

    @torch.no_grad()
    def prompt(self, length: int, seed: int = 0, padded: bool = True) -> tuple[Tensor, Tensor]:
        given = prompt(self.batch, length, seed, PADS[: self.batch] if padded else ())
        given["position_ids"] = given["position_ids"] + self.cache.seen_tokens[:, None]
        if not padded:
            del given["attention_mask"]
        out = self.ours(**given, use_cache=False).logits
        assert out.shape[:2] == (self.batch, length)
        return out[:, -1], self.theirs.prefill(given["input_ids"], given.get("attention_mask"))

    @torch.no_grad()
    def token(self, ids: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        given: dict[str, Tensor] = {} if active is None else {"attention_mask": active[:, None].long()}
        positions = self.cache.seen_tokens[:, None].clone()
        out = self.ours(ids, position_ids=positions, use_cache=False, **given).logits
        ours, theirs = out[:, 0], self.theirs.decode(ids, active)
        return (ours, theirs) if active is None else (ours[active], theirs[active])

    def assert_same_cache(self) -> None:
        assert torch.equal(self.cache.seen_tokens, self.theirs.cache.seen_tokens)
        for layer in range(len(self.cache.layers)):
            mine, yours = (State(**vars(cache.layers[layer])) for cache in (self.cache, self.theirs.cache))
            for row, head in product(range(self.batch), range(mine.weight.shape[1])):
                assert_same_slots(singles(mine, row, head), singles(yours, row, head))
                assert_same_slots(residuals(mine, row, head), residuals(yours, row, head))


def pair(name: str, batch: int, lower: str = "eager", **compile_options: Any) -> Pair:
    torch._dynamo.reset()
    return Pair(tiny(name), batch, lower, **compile_options)
