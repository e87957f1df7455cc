"""A stand-in for a compiled model: the same methods, every step recomputed by the untouched model, row by row.

It holds each row's tokens in a list, so a test can read what reached the cache.
"""

from typing import Any

import torch
from torch import Tensor, nn

from zsmerge_compile.errors import InputError, must
from zsmerge_compile.runtime.generate import GenerateMixin


class FakeStep(GenerateMixin):
    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.model: Any = model
        self.config, self.generation_config = self.model.config, self.model.generation_config
        self.device, self.dtype = self.model.device, self.model.dtype
        self.batch_size = batch_size
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self.prefills = self.decodes = self.changes = 0
        self.broken: list[int] = []

    @property
    def cache(self) -> Any:
        return self

    @property
    def seen_tokens(self) -> Tensor:
        return torch.tensor([len(row) for row in self.tokens], device=self.device)

    def check_prompt(self, input_ids: Tensor, attention_mask: Tensor | None, *, empty: bool) -> None:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if input_ids.shape[1] == 0 or (mask.sum(1) == 0).any():
            raise InputError(must("every row of input_ids", "at least one real token", "a row of none"))
        if (mask.diff(dim=1) < 0).any():
            raise InputError(must("attention_mask", "padded on the left", "a 0 after a 1"))

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: list[int] | None = None) -> Tensor:
        self.check_prompt(input_ids, attention_mask, empty=False)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for row, given, kept in zip(self.tokens, input_ids, mask, strict=True):
            row += given[kept.bool()].tolist()
        self.changes += 1
        self.prefills += 1
        return torch.cat([self._logits(row) for row in self.tokens])

    def decode(self, token_ids: Tensor, active: Tensor | None = None) -> Tensor:
        active = torch.ones(self.batch_size, dtype=torch.bool) if active is None else active
        logits = torch.full((self.batch_size, self.config.vocab_size), torch.nan, dtype=self.dtype, device=self.device)
        for index in active.nonzero().flatten().tolist():
            self.tokens[index].append(int(token_ids[index]))
            logits[index] = self._logits(self.tokens[index])[0]
        self.changes += 1
        self.decodes += 1
        return logits

    def reset(self, rows: list[int] | None = None) -> None:
        for row in range(self.batch_size) if rows is None else rows:
            self.tokens[row] = []
        self.changes += 1

    def mark_broken(self, rows: list[int]) -> None:
        self.broken += rows

    @torch.no_grad()
    def _logits(self, tokens: list[int]) -> Tensor:
        return self.model(torch.tensor([tokens], device=self.device), use_cache=False).logits[:, -1]
