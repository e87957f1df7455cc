"""What a token's score is, by which the context keeps tokens: the part of the specification that policies differ in.

    received   score = decay**n * score + sum_j decay**(n-j) * attention_j  (eq. 5; without decay H2O's)
    age        score = -position: the context keeps the oldest tokens (attention sinks; `ops/cam.py` may merge others)
    observed   a prompt's tokens: sum of the attention of its last `observed` queries, pooled over neighbours (SnapKV);
               tokens that are decoded: -1, below any prompt token

Attention is summed over the query heads of a group. Shapes: b rows, G key/value heads, n new tokens, S slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zsmerge_compile.ops.state import Rule, State

SCORINGS = ("received", "age", "observed")
POOLINGS = ("avg", "max")
DECODED = -1.0  # "observed": score of a token that no prompt brought


def discount(rule: Rule, age: Tensor) -> Tensor:
    """What the attention of a query counts that was `age` tokens ago (0: the newest): fp32, of age's shape."""
    if rule.scoring == "received":
        return torch.full_like(age, rule.decay, dtype=torch.float32) ** age
    return (age < rule.observed).float()


def after_prompt(
    state: State, held: Tensor, received: Tensor, seen: Tensor, pads: Tensor, rule: Rule, decoded: bool = False
) -> tuple[Tensor, Tensor]:
    """Scores of the slots [b, G, S] and of the new tokens [b, G, n], from the discounted attention they received.

    decoded: the tokens are no part of a prompt.
    """
    live = state.weight > 0
    n = received.shape[2]
    column = torch.arange(n, device=received.device)
    if rule.scoring == "age":
        at = (seen[:, None] + column - pads[:, None]).float()
        return torch.where(live, -state.position.float(), 0.0), -at[:, None].expand_as(received)
    if rule.scoring == "observed" and decoded:
        return state.score, torch.full_like(received, DECODED)
    if rule.scoring == "observed":
        return torch.where(live, held, 0.0), torch.where(column < n - rule.observed, pooled(received, rule), received)
    new_count = (n - pads)[:, None, None]
    decayed = state.score * torch.full_like(state.score, rule.decay) ** new_count
    return torch.where(live, decayed + held, 0.0), received


def after_step(mass: Tensor, score: Tensor, weight: Tensor, position: Tensor, is_new: Tensor, rule: Rule) -> Tensor:
    """Scores [B, G, S] after one token, `is_new`, has joined; mass: the attention it paid to each slot."""
    if rule.scoring == "age":
        return torch.where(weight > 0, -position.float(), 0.0)
    if rule.scoring == "observed":
        return torch.where(is_new, DECODED, torch.where(weight > 0, score, 0.0))
    return torch.where(is_new, mass, torch.where(weight > 0, score * rule.decay + mass, 0.0))


def pooled(received: Tensor, rule: Rule) -> Tensor:
    """Each token's mean or maximum over `kernel` tokens around it, those of the last `observed` left out: [b, G, n]."""
    n = received.shape[2]
    before = torch.arange(n, device=received.device) < n - rule.observed
    padded = F.pad(torch.where(before, received, 0.0), (rule.kernel // 2, rule.kernel // 2))
    # slices, as exporters fix the length of what a pooling operator gets
    around = torch.stack([padded[..., shift : shift + n] for shift in range(rule.kernel)])
    return around.amax(0) if rule.pooling == "max" else around.mean(0)
