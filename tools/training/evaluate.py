"""The figures a model is judged by: bits per byte of held-out code, and recall of planted facts."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from training.stream import Stream
from training.tasks import ANSWER_TOKENS, FactFormat, recall_prompt

LENGTHS = (512, 1024, 2048)  # tokens, question and answer included
FACT_COUNTS = (6, 12, 24)
_TOKENS_PER_BATCH = 8_192


class HeldOut(NamedTuple):
    bits_per_byte: float
    loss: float  # nats per token
    tokens: int


class Recall(NamedTuple):
    length: int  # tokens
    facts: int
    key_tokens: int
    prompts: int
    share: float  # of prompts whose two answer tokens are both the most likely ones


@torch.no_grad()
def held_out_figures(model: PreTrainedModel, stream: Stream, length: int) -> HeldOut:
    """Every held-out token but the first is predicted once, from the tokens before it in its window of `length`."""
    nats, count = 0.0, len(stream.ids) - 1
    for begin in range(0, count, length):
        nats += _nats(model, torch.from_numpy(stream.ids[None, begin : begin + length + 1]))
    return HeldOut(nats / math.log(2) / stream.bytes, nats / count, count)


@torch.no_grad()
def recall(model: PreTrainedModel, form: FactFormat, stream: Stream, length: int, facts: int, prompts: int) -> Recall:
    """Recall over `prompts` test prompts, the same ones at every call."""
    rng = np.random.default_rng([length, facts, form.key_tokens])
    right, most = 0, max(1, _TOKENS_PER_BATCH // length)
    for begin in range(0, prompts, most):
        size = min(prompts - begin, most)
        drawn = [recall_prompt(rng, form, stream, length, facts).ids for _ in range(size)]
        ids = torch.from_numpy(np.stack(drawn))
        hidden = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state[:, -ANSWER_TOKENS:]
        predicted = model.get_output_embeddings()(hidden).argmax(-1)
        right += int((predicted == ids[:, -ANSWER_TOKENS:]).all(dim=1).sum())
    return Recall(length, facts, form.key_tokens, prompts, right / prompts)


def recall_table(model: PreTrainedModel, forms: Iterable[FactFormat], stream: Stream, prompts: int) -> list[Recall]:
    return [
        recall(model, form, stream, length, facts, prompts)
        for form in forms
        for facts in FACT_COUNTS
        for length in LENGTHS
    ]


def _nats(model: PreTrainedModel, ids: Tensor) -> float:
    """Summed negative log-likelihood of ids[:, 1:], nats; ids: [B, T+1]."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
