"""One generate call: which rows are still active, and what its handle has to know afterwards."""

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from zsmerge_compile.errors import InputError, must
from zsmerge_compile.runtime.handle import CacheHandle
from zsmerge_compile.runtime.stopping import PadAfterStop, Watched


class Session:
    """Follows one call from its prompt to its last token.

    handle: what the call continues from, or a new one. given_mask: the caller's attention_mask, kept because
    transformers drops a mask that is all ones, and its width with it.
    """

    def __init__(self, handle: CacheHandle, given_mask: Tensor | None) -> None:
        self.handle = handle
        self.continues = handle.ids.shape[1] > 0
        self.started = False
        self.active = torch.ones_like(handle.held, dtype=torch.bool)  # [B]
        self._given_mask = given_mask
        self._sampled = torch.zeros_like(handle.held)  # [B] tokens each row sampled while it was active
        self._prompt_width = 0
        self._columns: Tensor | None = None

    def prompt(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All columns and their mask, bool or None for all ones, from the ids [B, T] and mask transformers has."""
        self._prompt_width, known = ids.shape[1], self.handle.mask
        if not self.continues:
            return ids, None if mask is None else mask != 0
        if self._given_mask is not None:
            mask = self._given_mask.to(ids.device) != 0
            return self.handle.whole(ids, mask), mask
        if ids.shape[1] < known.shape[1]:
            expected = f"at least {known.shape[1]} columns wide, as the sequences so far"
            hint = "or come with an attention_mask over all columns"
            raise InputError(must("input_ids", expected, ids.shape[1], hint))
        new = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        return ids, torch.cat([known, new[:, known.shape[1] :]], 1)

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """The tokens of all columns [B, K] are in the cache."""
        self.handle.ids, self.handle.mask = ids, mask
        self.started = True

    def watch(self, criteria: StoppingCriteriaList, generation_config: Any) -> StoppingCriteriaList:
        """The same criteria, telling this session of every row they stop."""
        if not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
            criteria.append(PadAfterStop())
        if generation_config._pad_token_tensor is None:
            generation_config._pad_token_tensor = torch.zeros((), dtype=torch.long, device=self.active.device)
        return Watched(criteria, self.sampled)

    def sampled(self, columns: Tensor, done: Tensor) -> None:
        """transformers appended a column to `columns` [B, T]; `done` [B] are the rows that stop with it."""
        self._columns = columns
        self._sampled = self._sampled + self.active
        self.active = self.active & ~done.to(self.active.device)

    def generated(self, columns: Tensor, sampled: Tensor) -> None:
        """Our own loop wrote `columns` [B, T + n], of which `sampled` [B] in each row while it was active."""
        self._columns, self._sampled = columns, sampled

    def end(self, held: Tensor, changes: int) -> None:
        """The handle takes in the generated columns. held [B]: tokens each row's cache has seen."""
        handle = self.handle
        if self._columns is not None:
            new = self._columns[:, self._prompt_width :].to(handle.ids.device)
            valid = torch.arange(new.shape[1], device=new.device) < self._sampled[:, None]
            handle.ids, handle.mask = torch.cat([handle.ids, new], 1), torch.cat([handle.mask, valid], 1)
        handle.held, handle.changes = held.clone(), changes
