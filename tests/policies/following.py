"""A compiled model beside the one it was made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def untouched(model: Any, ids: Tensor) -> Tensor:
    """The given model's own logits [b, vocab] of the last of ids [b, T]."""
    with torch.no_grad():
        logits: Tensor = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
    return logits


def assert_follows(ours: Any, model: Any, ids: Tensor, steps: int) -> Tensor:
    """Its logits are the model's, for the prompt and `steps` greedy tokens after it; returns the last token [b, 1]."""
    logits = ours.prefill(ids)
    for _ in range(steps):
        torch.testing.assert_close(logits, untouched(model, ids), rtol=1e-4, atol=1e-4)
        token = logits.argmax(-1, keepdim=True)
        ids, logits = torch.cat([ids, token], 1), ours.decode(token)
    return token
