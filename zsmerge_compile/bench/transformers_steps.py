"""The baselines: one decode step, or one prompt, as transformers runs them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.bench.rows import Row
from zsmerge_compile.bench.timing import Step
from zsmerge_compile.runtime.options import cache_argument

ROOM = 64  # tokens a static cache holds beyond the context: those that a block of steps adds


def dynamic_step(model: Any, row: Row) -> Step:
    """A step at `context` tokens held; the tokens a block of steps adds are taken back."""
    from transformers import DynamicCache

    cache, ids = DynamicCache(config=model.config), _ids(model, row.batch)
    given, (heads, dim) = cache_argument(model, cache), _cache_shape(model)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*(_random(model, row.batch, heads, row.context, dim) for _ in range(2)), layer)

    def prepare() -> None:
        added = int(cache.get_seq_length()) - row.context
        if added:
            cache.crop(-added)

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, use_cache=True, **given)

    return Step(run, prepare, cache_bytes=_cache_bytes(model, row), slots=row.context)


def static_step(model: Any, row: Row) -> Step:
    """A step by `torch.compile(model.forward)` over a StaticCache, the way transformers' documentation has it."""
    from transformers import StaticCache

    heads, dim = _cache_shape(model)
    cache: Any = StaticCache(config=model.config, max_cache_len=row.context + ROOM)
    cache.early_initialization(row.batch, heads, dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    gpu = model.device.type == "cuda"
    forward = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead" if gpu else None)
    ids, given = _ids(model, row.batch), cache_argument(model, cache)
    position = torch.full((row.batch, 1), row.context, device=model.device)

    def prepare() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(row.context)

    @torch.no_grad()
    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        forward(input_ids=ids, position_ids=position, use_cache=True, **given)

    return Step(run, prepare, cache_bytes=_cache_bytes(model, row), slots=row.context + ROOM)


def prompt_step(model: Any, row: Row) -> Step:
    """transformers' own prefill of `context` tokens into a DynamicCache, logits of the last position only."""
    ids = _ids(model, row.batch, row.context)

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, use_cache=True, **_last_logits(model))

    return Step(run, tokens=row.context, cache_bytes=_cache_bytes(model, row), held_bytes=0, slots=row.context)


def _last_logits(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _cache_shape(model: Any) -> tuple[int, int]:
    """Key/value heads and head dim of the cache that this model fills."""
    with torch.no_grad():
        layer = model(input_ids=_ids(model, 1), use_cache=True).past_key_values.layers[0]
    return int(layer.keys.shape[1]), int(layer.keys.shape[3])


def _cache_bytes(model: Any, row: Row) -> int:
    heads, dim = _cache_shape(model)
    return 2 * int(model.config.num_hidden_layers) * row.batch * heads * row.context * dim * int(model.dtype.itemsize)


def _ids(model: Any, batch: int, tokens: int = 1) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, tokens), device=model.device)


def _random(model: Any, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=model.dtype, device=model.device)
