"""Block sizes by shape: a rule for every shape, and a table of measured ones that overrides it.

`tools/kernels tune` measures the decode kernels on a GPU and writes the table, `blocks.json` beside this file, with
the hardware and the versions it was measured on. It does not sweep the prefill kernels: they have the rule's blocks,
unless somebody writes an "extend" entry by hand. Nothing is tuned at the first call. This file imports no triton.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("blocks.json")
MOST_SPLITS = 128
SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}  # KiB of one block


@dataclass(frozen=True)
class DecodeBlocks:
    """How a decode step is cut up."""

    block: int  # slots in one turn of the split kernel's loop
    heads: int  # query heads that one program of it serves at most; a larger group is shared out
    warps: int
    stages: int  # turns of the loop in flight
    branch: bool  # jump over dead blocks (no pipelining) instead of masking their loads
    programs: int  # programs of the split kernel wanted for each multiprocessor
    tile: int  # slots of one program of the finish kernel
    finish_warps: int
    residual_block: int  # residual slots compared at a time


@dataclass(frozen=True)
class ExtendBlocks:
    """How the prefill kernels are cut up."""

    rows: int  # queries at a time
    columns: int  # keys at a time
    warps: int
    stages: int
    residual_block: int  # residual slots compared at a time where their keys are not held
    held_keys: int = 32_768  # numbers of residual keys that the merge may hold in registers


@dataclass(frozen=True)
class DecodePlan:
    """The blocks, and the grid they give for one shape."""

    blocks: DecodeBlocks
    chunk: int  # slots of one split, a multiple of the block
    splits: int
    tiles: int  # programs of the finish kernel for each row and key/value head


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def padded_dim(head_dim: int) -> int:
    """Elements of a head as the kernels hold it: `tl.dot` wants at least 16, `tl.arange` a power of two."""
    return max(16, power_of_two(head_dim))


def rule(itemsize: int, head_dim: int, group: int) -> DecodeBlocks:
    """Blocks for shapes that nobody has measured: about 16 KiB of keys a turn."""
    wide = padded_dim(head_dim)
    block = max(16, min(128, 16384 // (wide * itemsize)))
    return DecodeBlocks(
        block=min(block, 64) if group > 16 else block,
        heads=32 if itemsize == 2 else 16,
        warps=4,
        stages=3 if itemsize == 2 else 2,
        branch=False,
        programs=4,
        tile=256,
        finish_warps=4,
        residual_block=max(16, 8192 // wide),
    )


def extend_rule(itemsize: int, head_dim: int) -> ExtendBlocks:
    """Prefill blocks for shapes that nobody has measured."""
    wide = padded_dim(head_dim)
    residual_block = max(16, 8192 // wide)
    if itemsize == 4:  # exact fp32 products run on the ordinary units: registers are what is short
        return ExtendBlocks(32 if wide <= 128 else 16, 16, 8, 2, residual_block)
    return ExtendBlocks(128, 64, 8, 2, residual_block) if wide <= 128 else ExtendBlocks(64, 32, 8, 2, residual_block)


def shape_key(itemsize: int, head_dim: int, group: int, arch: int) -> str:
    """The table's key: element size, padded head dim, query heads of a group rounded up, architecture."""
    return f"sm_{arch} {8 * itemsize} bit d={padded_dim(head_dim)} r={power_of_two(group)}"


@functools.cache
def measured(op: str) -> dict[str, dict[str, Any]]:
    """The table's entries for an op ("decode", "extend"), empty where nothing has been measured yet."""
    return dict(json.loads(TABLE.read_text(encoding="utf-8")).get(op, {})) if TABLE.exists() else {}


def decode_blocks(itemsize: int, head_dim: int, group: int, arch: int) -> DecodeBlocks:
    """The measured blocks of a shape on an architecture (80, 90, ...; 0: none), else the rule's."""
    found = measured("decode").get(shape_key(itemsize, head_dim, group, arch))
    return DecodeBlocks(**found) if found else rule(itemsize, head_dim, group)


def extend_blocks(itemsize: int, head_dim: int, arch: int) -> ExtendBlocks:
    """The rule's prefill blocks, but for a shape and an architecture with an entry in the table (`tune` makes none)."""
    found = measured("extend").get(shape_key(itemsize, head_dim, 1, arch))
    return ExtendBlocks(**found) if found else extend_rule(itemsize, head_dim)


def heads_of(blocks: DecodeBlocks, group: int) -> int:
    """Query heads of one program of the split kernel, a power of two."""
    return min(power_of_two(group), blocks.heads)


def plan(blocks: DecodeBlocks, pairs: int, slots: int, group: int, processors: int) -> DecodePlan:
    """The grid for `pairs` rows x key/value heads of `slots` slots on a device of `processors` multiprocessors."""
    most, shares = -(-slots // blocks.block), -(-group // heads_of(blocks, group))
    wanted = max(1, min(-(-blocks.programs * processors // (pairs * shares)), most, MOST_SPLITS))
    chunk = -(-most // wanted) * blocks.block
    tile = blocks.tile
    while tile < 1024 and pairs * -(-slots // tile) > 8 * processors > 8:
        tile *= 2
    tiles = max(-(-slots // tile), min(group, 32))  # outputs are shared out among the tiles' programs, a head at a time
    return DecodePlan(replace(blocks, tile=tile), chunk, -(-slots // chunk), tiles)
