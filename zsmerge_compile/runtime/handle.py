"""The `past_key_values` of a compiled model: which tokens of which columns its cache holds.

A compressed cache cannot be asked what it holds, so the handle keeps the token ids beside it. Columns are those of
`sequences` as transformers counts them, pads included; tokens are the real ones, where the mask is 1.
"""

import torch
from torch import Tensor

from zsmerge_compile.errors import InputError, must


class CacheHandle:
    """What an earlier `generate` returned as past_key_values, and a later one continues from.

    ids, mask: [B, K] every column so far, prompts and generated tokens; the mask is False on pads.
    held: [B] how many of a row's tokens are in its cache. The token sampled last is never among them, nor is the
        token a row stopped at.
    changes: the cache's change count when this was true.
    """

    is_compileable = False  # else transformers compiles `forward` itself, and builds 4-D masks for it
    is_croppable = False  # else transformers may take back a step (it defers the stop check on MPS)

    def __init__(self, rows: int, device: torch.device) -> None:
        self.ids = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self.mask = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.held = torch.zeros(rows, dtype=torch.long, device=device)
        self.changes = -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns the cache accounts for, pads included: all but the one sampled last."""
        return max(self.ids.shape[1] - 1, 0)

    def whole(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The ids of every column of `mask`, [B, K']: `ids` as they are, or after the columns they leave out.

        As with any transformers cache, `ids` [B, T] may be all columns or only the new ones; the width of the mask
        says which. Raises InputError where the columns left out are not all known.
        """
        missing = mask.shape[1] - ids.shape[1]
        if not 0 <= missing <= self.ids.shape[1]:
            widths = f"between {ids.shape[1]} and {self.ids.shape[1] + ids.shape[1]} columns wide"
            raise InputError(must("attention_mask", widths, mask.shape[1]))
        return torch.cat([self.ids[:, :missing], ids], 1) if missing else ids

    def unfed(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens the cache does not hold yet, rows padded on the left together: ids and mask, [B, N].

        ids [B, K'] and mask (bool) are all columns. Raises InputError where a row does not begin with the tokens
        that its cache holds, or brings nothing new.
        """
        self._check_continues(ids, mask)
        return to_the_right(ids, mask & (mask.cumsum(1) > self.held[:, None]))

    def _check_continues(self, ids: Tensor, mask: Tensor) -> None:
        real, held = mask.sum(1), self.held
        for row in (real <= held).nonzero().flatten().tolist():
            expected = f"the {held[row]} tokens that the cache holds and at least one new token"
            hint = "pass the whole sequence, or the new columns with an attention_mask over all columns"
            raise InputError(must(f"row {row} of input_ids", expected, f"{real[row]} tokens", hint))
        width = int(held.max())
        known, given = _to_the_left(self.ids, self.mask)[:, :width], _to_the_left(ids, mask)[:, :width]
        differs = (known != given) & (torch.arange(width, device=held.device) < held[:, None])
        for row, place in differs.nonzero().tolist():
            expected = f"{known[row, place]}, as in the cache"
            raise InputError(must(f"token {place} of row {row} of input_ids", expected, int(given[row, place])))


def to_the_right(ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The kept columns of each row in their order, against the right edge, no wider than needed: ids, mask [B, N]."""
    order = torch.argsort(keep.to(torch.int8), dim=1, stable=True)
    width = int(keep.sum(1).max())
    order = order[:, order.shape[1] - width :]
    return ids.gather(1, order), keep.gather(1, order)


def _to_the_left(ids: Tensor, keep: Tensor) -> Tensor:
    return ids.gather(1, torch.argsort((~keep).to(torch.int8), dim=1, stable=True))
