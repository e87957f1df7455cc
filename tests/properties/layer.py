"""One layer's cache as it runs in a model, without the model; and full attention over the same tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.strategies import Case, Tokens, tokens
from zsmerge_compile.ops import decode, prefill
from zsmerge_compile.ops.cpp import build
from zsmerge_compile.ops.cpp import decode as cpp_decode
from zsmerge_compile.ops.cpp import extend as cpp_extend
from zsmerge_compile.ops.state import Rule, State


class Layer:
    """State and tokens seen of `case.batch` rows, driven by the kernels that a compiled model runs on a CPU."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        build.load()
        self.case, self.rule = case, case.rule
        self.state = case.empty(dtype)
        self.seen = torch.zeros(case.batch, dtype=torch.int64)

    def extend(self, new: Tokens, pads: list[int] | None = None, rows: list[int] | None = None) -> Tensor:
        """n columns for `rows` (all by default), of which the first `pads` are padding: out [b, H, n, D]."""
        chosen = torch.tensor(range(self.case.batch) if rows is None else rows)
        skipped = torch.tensor([0] * len(chosen) if pads is None else pads)
        out = prefill.extend(self.state, *new, chosen, self.seen, skipped, self.rule, cpp_extend.PARTS)
        self.seen[chosen] += new.query.shape[2] - skipped
        return out

    def decode(self, new: Tokens, active: Tensor | None = None) -> Tensor:
        """One token per (active) row: out [B, H, 1, D]."""
        active = torch.ones_like(self.seen, dtype=torch.bool) if active is None else active
        out = decode.step(self.state, *new, self.seen, active, self.rule, cpp_decode.attend)
        self.seen += active
        return out

    def reset(self, rows: list[int]) -> None:
        for tensor in (*self.state, self.seen):
            tensor[rows] = 0

    def feed(self, new: Tokens, first: int = 0) -> Tensor:
        """The first `first` tokens as a prompt, the others one by one: out [B, H, n, D]."""
        outs = [self.extend(part(new, 0, first))] if first else []
        outs += [self.decode(part(new, t, t + 1)) for t in range(first, new.query.shape[2])]
        return torch.cat(outs, 2)

    def live(self, row: int, head: int) -> set[int]:
        """Positions of the newest members of a head's live slots."""
        return {int(p) for p in self.state.position[row, head][self.state.weight[row, head] > 0]}


def copy(state: State) -> State:
    return State(*(tensor.clone() for tensor in state))


def part(new: Tokens, start: int, stop: int, row: int | None = None) -> Tokens:
    """Columns start .. stop - 1 of all rows, or of one."""
    rows = slice(None) if row is None else slice(row, row + 1)
    return Tokens(*(tensor[rows, :, start:stop] for tensor in new))


def random_tokens(case: Case, n: int) -> Tokens:
    """n random tokens for every row of `case`, from its seed."""
    return tokens(case, case.batch, n, case.generator())


def full_attention(new: Tokens, rule: Rule) -> tuple[Tensor, Tensor]:
    """Softmax over all earlier tokens: out [B, H, n, D] and the weights [B, H, n, n].

    With `rule`'s window and, unrounded, its ALiBi; its budget and alpha play no part.
    """
    n, repeats = new.query.shape[2], new.query.shape[1] // new.key.shape[1]
    key, value = (t.double().repeat_interleave(repeats, 1) for t in new[1:])
    at = torch.arange(n)
    logits = new.query.double() @ key.mT * rule.scale
    if rule.slopes is not None:
        logits = logits + rule.slopes[:, None, None].double() * at / rule.alibi_divisor
    behind = at[:, None] - at
    seen = behind >= 0 if rule.window is None else (behind >= 0) & (behind < rule.window)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value).float(), weights.float()
