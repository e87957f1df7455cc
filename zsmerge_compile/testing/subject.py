"""The model under test: its compiled forms, made once and reused, and the references to compare them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zsmerge_compile.api import compile
from zsmerge_compile.config import Split, ZSMergeConfig
from zsmerge_compile.models.registry import spec_for
from zsmerge_compile.ops.policy import CachePolicy
from zsmerge_compile.runtime.model import CompiledModel
from zsmerge_compile.testing.attention_hook import kv_heads_of
from zsmerge_compile.testing.cases import FULL, Case, Sizes
from zsmerge_compile.testing.noise import Noise, is_known
from zsmerge_compile.testing.oracle import Oracle
from zsmerge_compile.testing.references import Listed, Reference, Untouched

HALVES = (torch.bfloat16, torch.float16)
MakePolicy = Callable[[int], CachePolicy]  # of so many slots
ROOM = 2  # times the tokens a case feeds: a policy other than ZSMerge may hold some apart from the newest


class Subject:
    """A model with everything its cases need. `kv_heads` is for a model whose config does not tell them, `policy` for
    another cache than ZSMerge's."""

    def __init__(
        self,
        model: nn.Module,
        backend: str,
        sizes: Sizes,
        budget_small: int,
        kv_heads: int | None,
        policy: MakePolicy | None = None,
    ) -> None:
        self.model: Any = model
        self.spec = spec_for(model)
        self.backend, self.sizes, self.budget_small = backend, sizes, budget_small
        self.dtype, self.device = next(model.parameters()).dtype, next(model.parameters()).device
        self.known = is_known(model)
        self.noise = Noise(self.model, self.spec, sizes.total)
        self._kv_heads = kv_heads
        self.policy = None if policy is None else self._roomy(policy)
        self._compiled: dict[tuple[str, int, str], CompiledModel] = {}

    @property
    def half(self) -> bool:
        return self.dtype in HALVES

    def config_of(self, case: Case) -> ZSMergeConfig:
        """The config that a user would write for this case."""
        budget = max(3, self.sizes.total) if case.check == FULL else self.budget_small
        if case.chunk is None:
            return ZSMergeConfig(budget, merge=case.merge)
        return ZSMergeConfig(budget, merge=case.merge, prefill="chunked", chunk=case.chunk)

    def _roomy(self, make: MakePolicy) -> CachePolicy:
        """The policy at a budget at which every layer holds all that a case feeds."""
        least = budget = max(3, ROOM * self.sizes.total)
        while min(make(budget).budgets(self.spec.num_layers)) < least:  # some spread it over the layers
            budget *= 2
        return make(budget)

    def compiled(self, case: Case) -> CompiledModel:
        """The compiled model of a case, empty. How a prompt is cut is no part of its graphs, so chunks share one."""
        key = (case.check, case.batch, case.merge)
        if key not in self._compiled:
            config = self.config_of(case) if self.policy is None else self.policy
            self._compiled[key] = compile(self.model, config, case.batch, self.backend)
        compiled = self._compiled[key]
        compiled.reset()
        compiled.chunk = case.chunk
        return compiled

    def reference(self, case: Case) -> Reference:
        """The untouched model at full budget, the oracle at a small one."""
        if case.check == FULL:
            return Untouched(self.model, self.spec.call)
        return Listed(self.oracle(case), case.chunk, self.half)

    def oracle(self, case: Case) -> Oracle:
        """ZSMerge on lists with the settings of a case."""
        config, windows = self.config_of(case), self.windows(case)
        return Oracle(
            self.model,
            [tuple(split) for split in self.splits(case)],  # type: ignore[misc]
            windows,
            config.alpha,
            config.decay,
            case.merge,
            case.batch,
            kv_heads=self.kv_heads(case),
            call=self.spec.call,
        )

    def windows(self, case: Case) -> list[int | None]:
        """Per layer what the config claims; what the passes found only where a model has no config to ask."""
        if self.known:
            return list(self.spec.windows)
        sites = self.compiled(case).report.sites
        return [claimed or site.window for claimed, site in zip(self.spec.windows, sites, strict=True)]

    def splits(self, case: Case) -> list[Split]:
        config = self.config_of(case)
        budgets = config.layer_budgets(self.spec.num_layers)
        return [config.split(budget, window) for budget, window in zip(budgets, self.windows(case), strict=True)]

    def kv_heads(self, case: Case) -> int:
        if self._kv_heads is not None:
            return self._kv_heads
        return kv_heads_of(self.model.config) if self.known else self.compiled(case).report.sites[0].kv_heads

    def why_no_oracle(self, case: Case) -> str:
        """What the oracle does not know of this model, "" if it knows enough."""
        if self.policy is not None:
            return f"the oracle is ZSMerge on lists of tokens, and this is {self.policy.name}"
        sites = self.compiled(case).report.sites
        if not self.known and any(site.slopes is not None for site in sites):
            return "the oracle reads ALiBi slopes from a transformers config, and this model has none"
        return ""
