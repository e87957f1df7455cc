"""Every check of a caller's input, before the first write to the cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from zsmerge_compile.errors import InputError, must

INTEGERS = (torch.int64, torch.int32)


class Prompt(NamedTuple):
    """A checked prompt: b rows, T columns, left-padded."""

    ids: Tensor  # [b, T] int64
    pads: Tensor  # [b] int64 leading padding columns
    rows: list[int]  # cache rows, all different
    lengths: list[int]  # real tokens per row


def check_prompt(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    rows: Iterable[int] | Tensor | None,
    *,
    batch_size: int,
    vocab_size: int,
    device: torch.device,
) -> Prompt:
    """Refuse what cannot be a prompt; raises InputError."""
    chosen = check_rows(rows, batch_size)
    _check_ids("input_ids", input_ids, "[batch, length]", vocab_size, device)
    if input_ids.shape[0] != len(chosen):
        hint = "" if rows is not None else "or name the rows of the cache with rows="
        what = "input_ids' batch" if rows is not None else "batch of input_ids"
        expected = f"{len(chosen)}, as compiled for" if rows is None else f"len(rows), {len(chosen)}"
        raise InputError(must(what, expected, input_ids.shape[0], hint))
    if input_ids.shape[1] == 0:
        raise InputError(must("prompt", "at least one token long", "an empty prompt"))
    pads = _count_padding(attention_mask, input_ids)
    lengths = [input_ids.shape[1] - pad for pad in pads]
    return Prompt(input_ids.long(), torch.tensor(pads, device=device), chosen, lengths)


def check_rows(rows: Iterable[int] | Tensor | None, batch_size: int) -> list[int]:
    """Row numbers as a list: all of them for None; raises InputError unless they are distinct and in range."""
    if rows is None:
        return list(range(batch_size))
    chosen = rows.tolist() if isinstance(rows, Tensor) else list(rows) if isinstance(rows, Iterable) else rows
    good = isinstance(chosen, list) and all(isinstance(r, int) and not isinstance(r, bool) for r in chosen)
    if not good or not chosen or len(set(chosen)) != len(chosen) or not all(0 <= r < batch_size for r in chosen):
        raise InputError(must("rows", f"distinct row numbers in 0 .. {batch_size - 1}, at least one", rows))
    return chosen


def check_tokens(token_ids: Tensor, *, batch_size: int, vocab_size: int, device: torch.device) -> None:
    """Refuse what cannot be one token per row; raises InputError. Values are looked at on the CPU only (no sync)."""
    _check_ids("token_ids", token_ids, f"[{batch_size}, 1]", vocab_size if device.type == "cpu" else None, device)
    if token_ids.shape != (batch_size, 1):
        raise InputError(must("token_ids", f"of shape [{batch_size}, 1], as compiled for", list(token_ids.shape)))


def check_active(active: Tensor, batch_size: int, device: torch.device) -> None:
    """Refuse what cannot tell active rows; raises InputError."""
    if not isinstance(active, Tensor) or active.dtype != torch.bool or active.shape != (batch_size,):
        got = f"{active.dtype} {list(active.shape)}" if isinstance(active, Tensor) else type(active).__name__
        raise InputError(must("active", f"a bool tensor of shape [{batch_size}]", got))
    _check_device("active", active, device)


def check_positions(lengths: Iterable[int], max_positions: int | None, what: str = "tokens seen") -> None:
    """Refuse tokens past the last; `lengths`: tokens each row would have seen."""
    longest = max(lengths)
    if max_positions is not None and longest > max_positions:
        limit = f"at most {max_positions}, the model's positions or all that the cache takes"
        raise InputError(must(what, limit, longest))


def _check_ids(what: str, ids: Tensor, shape: str, vocab_size: int | None, device: torch.device) -> None:
    if not isinstance(ids, Tensor):
        raise InputError(must(what, f"a tensor of shape {shape}", type(ids).__name__))
    if ids.dtype not in INTEGERS:
        raise InputError(must(what, "int64 or int32", ids.dtype))
    if ids.dim() != 2:
        raise InputError(must(what, f"of shape {shape}", list(ids.shape)))
    _check_device(what, ids, device)
    if vocab_size is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise InputError(must(what, f"in 0 .. {vocab_size - 1}", f"{int(ids.min())} .. {int(ids.max())}"))


def _check_device(what: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InputError(must(what, f"on {device}", tensor.device))


def _count_padding(attention_mask: Tensor | None, input_ids: Tensor) -> list[int]:
    """Leading padding columns of each row."""
    if attention_mask is None:
        return [0] * input_ids.shape[0]
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise InputError(must("attention_mask", f"of input_ids' shape {list(input_ids.shape)}", got))
    _check_device("attention_mask", attention_mask, input_ids.device)
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise InputError(must("attention_mask", "0 at padding and 1 at tokens", "other values"))
    real = attention_mask.bool()
    if not bool(real.any(1).all()):
        empty = (~real.any(1)).nonzero().flatten().tolist()
        raise InputError(must("every row of attention_mask", "at least one token", f"only padding in rows {empty}"))
    if bool((real[:, 1:] < real[:, :-1]).any()):
        hint = "set tokenizer.padding_side = 'left'"
        raise InputError(must("padding", "on the left", "padding after a token", hint))
    return [int(pad) for pad in (~real).sum(1).tolist()]
