"""What the Triton kernels can serve. Importing this imports no triton."""

from __future__ import annotations

import importlib.util

import torch

OLDEST = (8, 0)  # compute capability: Ampere, the first with bf16 matrix products and asynchronous copies
WIDEST_HEAD = 256
LARGEST_GROUP = 128
SCORINGS = ("received", "age", "observed")  # of `ops.scores`; kernels know them by their number
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    kv_heads: int,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """Why the kernels cannot serve a layer of this shape, in words, or None: they can.

    capability: the device's compute capability, as of `torch.cuda.get_device_capability`; None leaves it unchecked.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"dtype {dtype} is none of {', '.join(map(str, DTYPES))}"
    if not 1 <= head_dim <= WIDEST_HEAD:
        return f"head dim {head_dim} is above {WIDEST_HEAD}"
    if heads % kv_heads:
        return f"{heads} query heads cannot share {kv_heads} key/value heads evenly"
    if heads // kv_heads > LARGEST_GROUP:
        return f"{heads // kv_heads} query heads for each key/value head are above {LARGEST_GROUP}"
    if capability is not None and capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
    return None
