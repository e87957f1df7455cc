"""One prompt, one true continuation: the untouched model's growing cache beside compressed ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from zsmerge_compile.api import compile
from zsmerge_compile.config import ZSMergeConfig


@dataclass(frozen=True)
class Material:
    """prompt [1, T], and truth [1, N]: what really follows it; `new_tokens` are written by each method."""

    prompt: Tensor
    truth: Tensor
    new_tokens: int


@dataclass(frozen=True)
class Outcome:
    """One method's figures.

    slots          per key/value head; for a full cache, the tokens it has come to hold
    loss           nats per token of the truth, each token predicted from the ones before it
    cache_bytes    allocated after the last token of the truth
    ms_per_token   median over the truth's decode steps, milliseconds
    warm_seconds   compiling and the first step
    written        tokens of the greedy continuation
    """

    method: str
    slots: int
    loss: float
    cache_bytes: int
    ms_per_token: float
    warm_seconds: float
    written: list[int]


def full_cache(model: Any, material: Material) -> Outcome:
    """transformers' own model and DynamicCache."""
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    loss, ms = _follow(step, step, material)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    options = dict(max_new_tokens=material.new_tokens, do_sample=False)
    mask = torch.ones_like(material.prompt)
    out = model.generate(material.prompt, attention_mask=mask, **options)
    return Outcome("full cache", cache.get_seq_length(), loss, size, ms, 0.0, _written(out, material))


def compressed(model: Any, material: Material, share: float, backend: str) -> Outcome:
    """A compiled model whose budget is `share` of the prompt's length."""
    config = ZSMergeConfig.from_ratio(share, length=material.prompt.shape[1])
    started = time.perf_counter()
    compiled = compile(model, config, backend=backend)
    compiled.prefill(material.prompt)
    compiled.decode(material.truth[:, :1])
    warm = time.perf_counter() - started
    compiled.reset()
    loss, ms = _follow(compiled.prefill, compiled.decode, material)
    size = compiled.cache.nbytes
    mask = torch.ones_like(material.prompt)
    out = compiled.generate(material.prompt, attention_mask=mask, max_new_tokens=material.new_tokens, do_sample=False)
    slots = max(layout.budget for layout in compiled.report.layouts)
    return Outcome(f"{share:.0%} budget", slots, loss, size, ms, warm, _written(out, material))


def _follow(
    prefill: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], material: Material
) -> tuple[float, float]:
    """Feeds the prompt, then the truth one token at a time: its loss, and milliseconds per decode step."""
    truth, seconds = material.truth, []
    logits = [prefill(material.prompt)]
    for index in range(truth.shape[1] - 1):
        started = time.perf_counter()
        logits.append(decode(truth[:, index : index + 1]))
        seconds.append(time.perf_counter() - started)
    loss = torch.nn.functional.cross_entropy(torch.cat(logits).float(), truth[0])
    return float(loss), statistics.median(seconds) * 1000


def _written(out: Tensor, material: Material) -> list[int]:
    tokens: list[int] = out[0, material.prompt.shape[1] :].tolist()
    return tokens
