"""One call of the compiled model: from Dynamo's arguments to the runner and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.dynamo.handed import Handed
from zsmerge_compile.errors import InputError, must
from zsmerge_compile.runtime.runner import Runner


class Call:
    """Dynamo's arguments -> the graph's outputs, the cache written. Raises InputError or CacheStateError."""

    def __init__(self, runner: Runner, graph: Handed, options: Mapping[str, Any]) -> None:
        self._options = options  # the caller's own, by which Dynamo tells compiled functions apart
        self._runner, self._places, self._single = runner, graph.places, graph.single
        self._weights, self._floats = tuple(graph.weights.items()), tuple(graph.floats.items())
        self._token = graph.length == 1

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        same = all(arguments[number] is tensor for number, tensor in self._weights)
        if not same or any(arguments[number].item() != given for number, given in self._floats):
            what, got = "weights and constants of the model", "others (assigned anew since)"
            raise InputError(must(what, "those that were compiled", got, "torch._dynamo.reset()"))
        if self._options.get("cache") is not self._runner.cache:
            hint = "give every torch.compile a dict of its own, and call torch._dynamo.reset()"
            raise InputError(must('options["cache"]', "the cache that was compiled for", "another", hint))
        if torch.is_grad_enabled():
            hint = "with torch.inference_mode(): or torch.no_grad()"
            raise InputError(must("gradient mode", "off, as the cache has no gradients", "on", hint))
        ids, mask, positions = (
            self._argument(arguments, role) for role in ("input_ids", "attention_mask", "position_ids")
        )
        if mask is not None:
            mask = mask.long()
        if positions is not None:
            self._check_positions(positions, mask)
        if self._token:
            out: Any = self._runner.decode(ids, None if mask is None else mask[:, 0] != 0)
        else:
            out = self._runner.prefill(ids, mask)
        return (out,) if self._single else tuple(out)

    def _argument(self, arguments: tuple[Any, ...], role: str) -> Any:
        return arguments[self._places[role]] if role in self._places else None

    def _check_positions(self, positions: Tensor, mask: Tensor | None) -> None:
        """The cache knows the positions; the caller's must be the same. A token's are looked at on the CPU only, as
        elsewhere the step would wait for the device.
        """
        if self._token and positions.device.type != "cpu":
            return
        real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask != 0
        expected = self._runner.cache.seen_tokens[:, None] + real.cumsum(-1) - 1
        if not torch.equal(positions[real].long(), expected[real]):
            row = int(((positions != expected) & real).any(-1).nonzero()[0])
            what = f"position_ids of row {row}"
            begins = f"counted on from the {int(self._runner.cache.seen_tokens[row])} tokens its cache has seen"
            hint = "cache.reset() before a new prompt"
            raise InputError(must(what, begins, positions[row][real[row]].tolist(), hint))
