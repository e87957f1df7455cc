"""A decode step of any cache policy, on a cache that it filled itself.

What a state holds and which of its slots are live is the policy's affair, so nothing is put there by hand: prompts in
pieces, more tokens than there are slots, then some steps. The timed steps go on from there.
"""

from __future__ import annotations

from typing import Any

import torch

from zsmerge_compile.bench.our_steps import facts
from zsmerge_compile.bench.rows import Row
from zsmerge_compile.bench.timing import Step
from zsmerge_compile.cli.policy import policy

FRESH = 512  # tokens fed beyond the slots
PIECE = 512  # tokens of a prompt at most
DECODED = 4  # of all tokens, the last, one by one
ROOM = 16  # tokens that a policy which takes no more than its budget is left
BLOCK = 8  # steps between two looks at that room, at most


def compiled_policy(model: Any, row: Row) -> Any:
    """The compiled model of a row that names a policy, its cache empty. Raises what making either raises.

    A policy that needs weights has random ones, as the model has.
    """
    import zsmerge_compile as zs

    assert row.budget is not None and row.policy is not None
    options: dict[str, Any] = {} if row.outline is None else {"outline": row.outline}
    choice = policy(row.policy).with_weights("random")
    return zs.compile(model, choice.make(row.budget), batch_size=row.batch, **options)


def policy_step(compiled: Any, row: Row) -> Step:
    """One `CompiledModel.decode`, checks and bookkeeping included, on a cache that `row.context` tokens filled.

    A policy that refuses more tokens than its budget is filled but for a few slots, and put back there when they are
    used up.
    """
    cache, limit = compiled.cache, compiled.program.policy.max_tokens
    tokens = row.context if limit is None else min(row.context, limit - min(ROOM, limit // 2))
    _fill(compiled, row.batch, tokens)
    held = None if limit is None else [tensor.clone() for tensor in (*cache.flat, cache.seen_tokens)]
    ids = torch.zeros(row.batch, 1, dtype=torch.int64, device=compiled.device)

    def prepare() -> None:
        if held is None or cache.longest + BLOCK <= limit:
            return
        for tensor, was in zip((*cache.flat, cache.seen_tokens), held, strict=True):
            tensor.copy_(was)
        cache.longest = tokens
        cache.changes += 1

    told = {**facts(compiled), "slot_bytes": slot_bytes(compiled)}
    return Step(lambda: compiled.decode(ids), prepare, cache_bytes=cache.nbytes, slots=row.slots, facts=told)


def slot_bytes(compiled: Any) -> float:
    """Bytes of state per row, key/value head, layer and slot, the one slot beyond the budget being one of them."""
    slots = sum(layout.kv_heads * layout.slots for layout in compiled.program.layouts)
    return sum(tensor.nbytes for tensor in compiled.cache.flat) / (compiled.batch_size * slots)


def _fill(compiled: Any, batch: int, tokens: int) -> None:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, compiled.program.spec.vocab_size, (batch, tokens), generator=random).to(compiled.device)
    for piece in ids[:, :-DECODED].split(PIECE, 1):
        compiled.prefill(piece)
    for column in ids[:, -DECODED:].split(1, 1):
        compiled.decode(column)
