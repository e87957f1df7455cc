"""What a compiled model is compared with: the untouched model, and the oracle on lists. Both take the same calls."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from zsmerge_compile.models.spec import Call as ModelCall
from zsmerge_compile.testing.cases import Call
from zsmerge_compile.testing.lists import differing_heads, load_state
from zsmerge_compile.testing.oracle import Oracle
from zsmerge_compile.testing.tolerance import DECISION, DECISION_HALF


class Answer(NamedTuple):
    """logits [B, vocab], and which rows of them another implementation must reproduce."""

    logits: Tensor
    rows: list[bool]


class Reference(Protocol):
    """One row per row of the compiled model."""

    def before(self, compiled: Any) -> None:
        """Called before each call, with the compiled model that is about to get the same one."""

    def __call__(self, call: Call) -> Answer:
        """Take a call."""

    def after(self, compiled: Any) -> str:
        """What is wrong with the compiled model's state after the call, "" if nothing."""


def positions_of(mask: Tensor) -> Tensor:
    """position_ids [B, T] as transformers counts them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class Untouched:
    """The given model, run anew on all columns so far at every call."""

    def __init__(self, model: nn.Module, call: ModelCall) -> None:
        self.model, self.call = model, call
        self.ids, self.mask = torch.empty(0), torch.empty(0)

    def before(self, compiled: Any) -> None:
        pass

    def after(self, compiled: Any) -> str:
        return ""

    @torch.no_grad()
    def __call__(self, call: Call) -> Answer:
        mask = call.mask if call.kind == "prefill" else call.mask.long()[:, None]
        first = self.ids.numel() == 0
        self.ids = call.ids if first else torch.cat([self.ids, call.ids], 1)
        self.mask = mask if first else torch.cat([self.mask, mask], 1)
        logits = self.call(self.model, self.ids, self.mask, positions_of(self.mask))
        return Answer(logits, [True] * len(logits))


class Listed:
    """The oracle. In float32 it goes its own way until a decision is a near tie; such a row is left.

    In bfloat16 and float16 decisions are too often close, so each call starts from the compiled model's state, and
    what is live afterwards must agree wherever no decision was within DECISION_HALF.
    """

    def __init__(self, oracle: Oracle, chunk: int | None, half: bool) -> None:
        self.oracle, self.chunk, self.half = oracle, chunk, half

    def before(self, compiled: Any) -> None:
        if self.half:
            load_state(self.oracle, compiled)

    def after(self, compiled: Any) -> str:
        return differing_heads(self.oracle, compiled, DECISION_HALF) if self.half else ""

    def __call__(self, call: Call) -> Answer:
        decided = self._decided()
        if call.kind == "decode":
            logits = self.oracle.decode(call.ids, call.mask)
            return Answer(logits, [one and on for one, on in zip(decided, call.mask.tolist(), strict=True)])
        logits = self.oracle.prefill(call.ids, call.mask, chunk=self.chunk)
        several = self.chunk is not None and call.ids.shape[1] > self.chunk
        return Answer(logits, self._decided() if several else decided)

    def _decided(self) -> list[bool]:
        """Rows none of whose decisions so far was a near tie."""
        limit, heads = DECISION_HALF if self.half else DECISION, self.oracle.heads
        return [min(head.margin for layer in heads for head in layer[row]) >= limit for row in range(self.oracle.batch)]
