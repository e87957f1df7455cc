"""Answers of a model compiled by this package, at any config.

The graphs are called node by node with the kernels that a compiled model runs on this device: what is judged is what
is served, without a compilation for each of some hundred configs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

import zsmerge_compile as zs
from quality_tool.answers import Answers
from quality_tool.material import Material
from quality_tool.methods import Method
from zsmerge_compile.lower import kernels
from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.ops import fold
from zsmerge_compile.ops.policy import CachePolicy
from zsmerge_compile.passes.graph import calling
from zsmerge_compile.runtime.model import CompiledModel


@torch.no_grad()
def judge(model: Any, method: Method, budget: int, material: Material) -> Answers:
    """All texts as one batch, then all recalls."""
    started, config = time.perf_counter(), method.config(budget)
    with by_cosine() if method.cosine else nullcontext():
        losses, greedy = _texts(_compiled(model, config, len(material.texts), method.cosine), material)
        recalls = len(material.recalls)
        right = _recalls(_compiled(model, config, recalls, method.cosine), material) if recalls else []
    return Answers(losses, greedy, right, round(time.perf_counter() - started, 2))


def _texts(compiled: CompiledModel, material: Material) -> tuple[list[float], list[list[int]]]:
    """Mean loss of each truth, nats per token; and the greedy continuations."""
    truth = torch.tensor([text.truth for text in material.texts])
    first = compiled.prefill(torch.tensor([text.prompt for text in material.texts]))
    after_prompt = snapshot(compiled)
    logits, nats = first, torch.zeros(len(truth))
    for step in range(truth.shape[1]):
        nats += functional.cross_entropy(logits, truth[:, step], reduction="none")
        logits = compiled.decode(truth[:, step : step + 1])
    restore(compiled, after_prompt)
    written, logits = [], first
    for _ in range(truth.shape[1]):
        written.append(logits.argmax(-1, keepdim=True))
        logits = compiled.decode(written[-1])
    return (nats / truth.shape[1]).tolist(), torch.cat(written, 1).tolist()


def _recalls(compiled: CompiledModel, material: Material) -> list[list[bool]]:
    """[recalls][questions]: the n-th questions of all recalls are one batch, each asked of the compressed prompt."""
    compiled.prefill(torch.tensor([recall.prompt for recall in material.recalls]))
    after_prompt, right = snapshot(compiled), []
    for questions in zip(*(recall.questions for recall in material.recalls), strict=True):
        restore(compiled, after_prompt)
        for column in torch.tensor([question.ids for question in questions]).T:
            logits = compiled.decode(column[:, None])
        first, second = torch.tensor([question.answer for question in questions]).T
        found = logits.argmax(-1) == first
        right.append(found & (compiled.decode(first[:, None]).argmax(-1) == second))
    answers: list[list[bool]] = torch.stack(right, 1).tolist()
    return answers


@torch.no_grad()
def kept_positions(model: Any, method: Method, budget: int, material: Material) -> list[list[int]]:
    """Newest members of the live slots after the first text's prompt, a list per layer and key/value head."""
    compiled = _compiled(model, method.config(budget), 1, method.cosine)
    compiled.prefill(torch.tensor([material.texts[0].prompt]))
    heads = [zip(layer.position[0], layer.weight[0], strict=True) for layer in compiled.cache.layers]
    return [sorted(position[weight > 0].tolist()) for layer in heads for position, weight in layer]


def snapshot(compiled: CompiledModel) -> list[Tensor]:
    return [tensor.clone() for tensor in (*compiled.cache.flat, compiled.cache.seen_tokens)]


def restore(compiled: CompiledModel, saved: list[Tensor]) -> None:
    for tensor, was in zip((*compiled.cache.flat, compiled.cache.seen_tokens), saved, strict=True):
        tensor.copy_(was)


def _compiled(model: Any, config: zs.ZSMergeConfig | CachePolicy, batch_size: int, reference: bool) -> CompiledModel:
    """The reference's graphs as they are, or with this device's kernels in the place of the cache ops."""
    compiled = zs.compile(model, config, batch_size, backend="eager")
    if reference:
        return compiled
    program = compiled.program
    ops = (program.policy.extend_op, program.policy.decode_op)
    chosen = [kernels.choose(op, program) for op in ops]
    graphs = (program.prefill, program.decode)
    run = [calling(gm, op, kernel.run) for gm, op, kernel in zip(graphs, ops, chosen, strict=True)]
    return CompiledModel(model, program, Lowered(*run, {}, {}), compiled.report, program.policy.chunk, check_nan=False)


@contextmanager
def by_cosine() -> Iterator[None]:
    """Within it, the reference merges into the residual slot of the largest cosine similarity."""

    def cosine(residual: Tensor, arrival: Tensor) -> Tensor:
        return functional.cosine_similarity(residual, arrival, dim=-1)

    with mock.patch.object(fold, "similarity", cosine):
        yield
