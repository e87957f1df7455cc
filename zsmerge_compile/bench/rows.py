"""What to measure: rows, and the groups of rows that are compared with each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from zsmerge_compile.bench.shapes import Shape
from zsmerge_compile.bench.timing import Plan

# What a row times. A step is one decode step of the whole model; an op, one layer's attention by itself.
METHODS = {
    "dynamic": "transformers DynamicCache",
    "static": "transformers StaticCache + torch.compile",
    "zsmerge": "zsmerge",
    "plain": "same compiled model, plain static attention",
    "op": "attention op alone: zsmerge",
    "op-plain": "attention op alone: plain (SDPA)",
    "prompt": "prefill: transformers",
    "prompt-full": "prefill: zsmerge, full",
    "prompt-chunked": "prefill: zsmerge, chunked",
    "loop": "decode loop with argmax",
    "generate": "generate()",
    "policy": "policy",
    "compile": "zs.compile, cold cache",
}
OURS = ("zsmerge", "plain", "prompt-full", "prompt-chunked", "loop", "generate", "policy")  # need a compiled model
CHUNK = 512


@dataclass(frozen=True)
class Row:
    """One measurement.

    context  tokens held by transformers' caches, seen by ours; of a prompt, its length
    budget   our slots per key/value head, one more in memory
    share    the budget's share of the context, where that is what chose it
    merge    prompts: the merge rule
    outline  whether alike layers are compiled once; None: as `zs.compile` decides
    policy   the cache policy, as --policies has it; None: ZSMerge, or none
    """

    method: str
    batch: int = 1
    context: int = 0
    budget: int | None = None
    share: float | None = None
    merge: str = "segment"
    outline: bool | None = None
    policy: str | None = None

    @property
    def slots(self) -> int:
        return self.context if self.budget is None else self.budget + 1

    @property
    def compiled(self) -> tuple[object, ...]:
        """Rows that are equal in this may share one compiled model."""
        return self.batch, self.budget, self.merge, self.outline, self.policy

    def label(self) -> str:
        """The row's name in tables."""
        parts = [" ".join(filter(None, (METHODS[self.method], self.policy)))]
        if self.budget is not None:
            whole = "full budget" if self.share == 1 else "" if self.share is None else f"{self.share:.0%}"
            parts.append(f"{self.slots:,} slots" + (f" ({whole})" if whole else ""))
        if self.method in ("prompt-full", "prompt-chunked"):
            parts.append(self.merge if self.method == "prompt-full" else f"chunks of {CHUNK}")
        if self.outline is not None:
            parts.append("layers outlined" if self.outline else "whole graph")
        return ", ".join(parts)

    def need(self, shape: Shape, dtype: torch.dtype) -> int:
        """Bytes beside the model's weights, about: the cache and the largest thing a step makes of it."""
        if self.method == "compile":
            return 0
        if self.method in ("op", "op-plain"):
            return max(2**28, shape.kv_bytes(self.slots, self.batch, dtype) // shape.depth)
        held = shape.kv_bytes(self.context if self.method == "prompt" else self.slots, self.batch, dtype)
        layer = shape.kv_bytes(self.context, self.batch, dtype) // shape.depth
        if self.method == "dynamic":
            return held + layer  # torch.cat makes a layer's cache anew each step
        if self.method.startswith("prompt"):
            width = int(shape.fields.get("intermediate_size", 4 * int(shape.fields["hidden_size"])))
            return held + 2 * layer + 3 * self.batch * self.context * width * dtype.itemsize
        return held


@dataclass(frozen=True)
class Group:
    """Rows timed in turn on one model, and what they are for.

    suite    the table it belongs to
    rows     the most important first
    plan     rounds
    note     printed beside the rows
    """

    suite: str
    shape: Shape
    dtype: torch.dtype
    rows: tuple[Row, ...]
    plan: Plan = Plan()
    note: str = ""

    def need(self, row: Row) -> int:
        """Bytes that a row needs, weights included."""
        return self.shape.parameters() * self.dtype.itemsize + row.need(self.shape, self.dtype)

    def facts(self, row: Row, device: torch.device) -> dict[str, Any]:
        """What a record says of a row before it is measured."""
        return {
            "suite": self.suite,
            "method": row.method,
            "label": row.label(),
            "model": self.shape.name,
            "parameters": self.shape.parameters(),
            "layers": row.context if row.method == "compile" else self.shape.depth,
            "full_depth": self.shape.full_depth,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": device.type,
            "batch": row.batch,
            "context": row.context,
            "budget": row.budget,
            "share": row.share,
            "slots": row.slots,
            "merge": None if row.budget is None else row.merge,
            "outline": row.outline,
            "note": self.note,
            "policy": row.policy,
        }

    def seconds(self, device: torch.device) -> float:
        """An estimate: mostly compiling."""
        gpu = device.type == "cuda"
        whole = {(row.method == "plain", *row.compiled): row for row in self.rows if row.method in OURS}
        theirs = {(row.batch, row.context) for row in self.rows if row.method == "static"}
        alone = sum(row.method in ("op", "op-plain") for row in self.rows)
        total = 5 + sum(self._build_seconds(row, gpu) for row in whole.values()) + 6 * alone
        total += len(theirs) * (10 * (1 + self.shape.depth / 48) if gpu else 20)
        turns = self.plan.rounds + max(1, self.plan.warmup)
        for row in self.rows:
            if row.method == "compile":
                total += self._cold_seconds(row, gpu)
            elif row.method.startswith("prompt"):
                total += turns * self._flops(row) / (2e14 if gpu else 1e11)
            else:
                total += turns * self.plan.block * self._step_seconds(row, gpu)
            if row.method == "policy":  # a prompt fills its cache
                total += self._flops(row) / (2e14 if gpu else 1e11)
        return total

    def _build_seconds(self, row: Row, gpu: bool) -> float:
        """Of zs.compile for a row that is timed; on a CPU as if no earlier run had left its kernels in the cache."""
        if gpu:
            return 10 * (1 + self.shape.depth / 48)
        return 20 if row.outline else 5 + 4.8 * self.shape.depth

    @staticmethod
    def _cold_seconds(row: Row, gpu: bool) -> float:
        """Of zs.compile from an empty cache; on a CPU (seen on two cores) the C++ kernels are built, too."""
        if gpu:
            return 15 + row.context * (0.3 if row.outline else 2)
        return 53 + 0.1 * row.context if row.outline else 40 + 4.8 * row.context

    def _step_seconds(self, row: Row, gpu: bool) -> float:
        """Bytes over what copies were seen to reach; a CPU reads transformers' caches at a fraction of that."""
        weights, cache = self.shape.weight_bytes(self.dtype), row.need(self.shape, self.dtype)
        if gpu:
            return (weights + cache) / 1.5e12
        return weights / 1e10 + cache / (2e9 if row.method in ("dynamic", "static") else 1e10)

    def _flops(self, row: Row) -> float:
        """Of a prompt: the layers' weights, and causal attention."""
        fields = self.shape.fields
        width = int(fields["hidden_size"])
        weights = self.shape.parameters() - 2 * int(fields["vocab_size"]) * width
        return row.batch * row.context * (2.0 * weights + 2 * self.shape.depth * width * row.context)


def fits(group: Group, row: Row, memory: int) -> str | None:
    """None, or why the row can't be measured with `memory` bytes."""
    need = group.need(row)
    return None if need <= memory else f"needs {need / 2**30:.0f} GiB"


def pack(group: Group, rows: list[Row], memory: int) -> list[list[Row]]:
    """The rows in their order, cut where they would not fit side by side; rows of one cache count once."""
    weights = group.shape.parameters() * group.dtype.itemsize
    parts: list[list[Row]] = []
    held: dict[tuple[object, ...], int] = {}
    for row in rows:
        cache = (row.method, row.batch, row.budget or row.context, row.outline, row.policy)
        own: dict[tuple[object, ...], int] = {cache: row.need(group.shape, group.dtype)}
        if parts and weights + sum({**held, **own}.values()) <= memory:
            parts[-1].append(row)
            held |= own
        else:
            parts.append([row])
            held = own
    return parts
