"""One prompt, one true continuation: the untouched model's growing cache beside compressed ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from zsmerge_compile.api import compile
from zsmerge_compile.config import ZSMergeConfig
from zsmerge_compile.runtime.options import cache_argument


@dataclass(frozen=True)
class Material:
    """prompt [1, T], and truth [1, N]: what really follows it; `new_tokens` are written by each method."""

    prompt: Tensor
    truth: Tensor
    new_tokens: int


@dataclass(frozen=True)
class Method:
    """A way to run the model: prefill [1, T] -> logits [1, vocab], decode [1, 1] -> logits [1, vocab]."""

    name: str
    prefill: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    generate: Callable[..., Tensor]
    slots: Callable[[], int]
    nbytes: Callable[[], int]
    warm_seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """One method's figures.

    slots          per key/value head; for a full cache, the tokens it has come to hold
    loss           nats per token of the truth, each token predicted from the ones before it
    cache_bytes    allocated after the last token of the truth
    ms_per_token   median over the truth's decode steps, milliseconds
    warm_seconds   compiling, the first prompt and the first step
    written        tokens of the continuation, sampled with the same seed by every method
    """

    method: str
    slots: int
    loss: float
    cache_bytes: int
    ms_per_token: float
    warm_seconds: float
    written: list[int]


def full_cache(model: Any) -> Method:
    """transformers' own model and DynamicCache."""
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]

    def nbytes() -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    return Method("full cache", step, step, model.generate, cache.get_seq_length, nbytes)


def compressed(model: Any, material: Material, share: float, backend: str) -> Method:
    """A compiled model whose budget is `share` of the prompt's length; warm, and empty."""
    started = time.perf_counter()
    compiled = compile(model, ZSMergeConfig.from_ratio(share, length=material.prompt.shape[1]), backend=backend)
    compiled.prefill(material.prompt)
    compiled.decode(material.truth[:, :1])
    warm = time.perf_counter() - started
    compiled.reset()
    slots = max(layout.budget for layout in compiled.report.layouts)
    steps = compiled.prefill, compiled.decode, compiled.generate
    return Method(f"{share:.0%} budget", *steps, lambda: slots, lambda: compiled.cache.nbytes, warm)


def compare(methods: Sequence[Method], material: Material, tick: Callable[[], None] = lambda: None) -> list[Outcome]:
    """Every method follows the truth, then writes its own continuation.

    Step by step in turn, so that whatever else the machine does slows all of them. `tick` is called after each token
    of the truth and after each continuation.
    """
    truth, seconds = material.truth, [list[float]() for _ in methods]
    logits = [[method.prefill(material.prompt)] for method in methods]
    for index in range(truth.shape[1] - 1):
        for method, rows, times in zip(methods, logits, seconds, strict=True):
            started = time.perf_counter()
            rows.append(method.decode(truth[:, index : index + 1]))
            times.append(time.perf_counter() - started)
        tick()
    outcomes = []
    for method, rows, times in zip(methods, logits, seconds, strict=True):
        loss = float(torch.nn.functional.cross_entropy(torch.cat(rows).float(), truth[0]))
        figures = (method.slots(), loss, method.nbytes(), statistics.median(times) * 1000, method.warm_seconds)
        outcomes.append(Outcome(method.name, *figures, _write(method, material)))
        tick()
    return outcomes


def _write(method: Method, material: Material) -> list[int]:
    options = dict(max_new_tokens=material.new_tokens, do_sample=True, temperature=0.6, top_k=20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = method.generate(material.prompt, attention_mask=torch.ones_like(material.prompt), **options)
    tokens: list[int] = out[0, material.prompt.shape[1] :].tolist()
    return tokens
