"""The operators a graph may hold: schemas, mutated arguments, fakes. What runs them stands in the files beside.

`zsmerge::attention`  the canonical form of every spelling of attention; it knows no cache.
`zsmerge::decode`     one token per row attends to the cache and joins it: the eager reference.
`zsmerge::extend`     many tokens per row, for chosen rows: prompts, whole or in chunks.

A cache op carries its state explicitly, so a lowering may expand it as it likes (see `lower/`).
Shapes: B batch, b rows of one call, H query heads, G key/value heads, T columns, S slots, R residual slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsmerge_compile.ops import prefill, reference
from zsmerge_compile.ops.state import Rule, State

_RULE = ", ".join(f"{str(field.type).replace(' | None', '?')} {field.name}" for field in fields(Rule))

_library = torch.library.Library("zsmerge", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale) -> Tensor"
)
TOKEN = ("seen", "active")  # what a call for one token per row tells beside the state
PROMPT = ("rows", "seen", "pads")  # and one for a prompt


def schema(name: str, state: Iterable[str], call: Iterable[str], more: Iterable[str] = ()) -> str:
    """A cache op's: it mutates `state`; the rule and `more` tensors are its trailing arguments."""
    written = ", ".join(f"Tensor({chr(ord('a') + i)}!) {field}" for i, field in enumerate(state))
    told, own = (", ".join(f"Tensor {tensor}" for tensor in tensors) for tensors in (call, more))
    given = ", ".join(part for part in (written, told, _RULE, own) if part)
    return f"{name}(Tensor query, Tensor new_key, Tensor new_value, {given}) -> Tensor"


_library.define(schema("decode", State._fields, TOKEN))
_library.define(schema("extend", State._fields, PROMPT))

STATE_AT = slice(3, 3 + len(State._fields))  # where the state stands among a cache op's arguments


def spelled(rule: Rule) -> tuple[Any, ...]:
    """The rule as a cache op's trailing arguments; `Rule(*spelled(rule))` is the rule again."""
    return tuple(getattr(rule, field.name) for field in fields(Rule))


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


@torch.library.impl(_library, "decode", "CompositeExplicitAutograd")
def _decode(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    state, (seen, active), rule = State(*rest[:9]), rest[9:11], Rule(*rest[11:])
    out, new = reference.extend(state, query, key, value, seen, (~active).long(), rule, decoded=True)
    for buffer, content in zip(state, new, strict=True):
        buffer.copy_(content)
    return out


@torch.library.impl(_library, "extend", "CompositeExplicitAutograd")
def _extend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    state, (rows, seen, pads), rule = State(*rest[:9]), rest[9:12], Rule(*rest[12:])
    return prefill.extend(state, query, key, value, rows, seen, pads, rule)


@torch.library.register_fake("zsmerge::attention", lib=_library)
@torch.library.register_fake("zsmerge::decode", lib=_library)
@torch.library.register_fake("zsmerge::extend", lib=_library)
def like_query(query: Tensor, *rest: object) -> Tensor:
    """The fake of every op here."""
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


ATTENTION = torch.ops.zsmerge.attention.default
DECODE = torch.ops.zsmerge.decode.default
EXTEND = torch.ops.zsmerge.extend.default
