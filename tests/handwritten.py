"""A decoder written by hand: not from transformers, no config, and other names than any of its models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mixer(nn.Module):
    """Causal self-attention: `queries` heads share `stores` keys and values; rotary positions, interleaved pairs."""

    def __init__(self, width: int, queries: int, stores: int) -> None:
        super().__init__()
        self.queries, self.stores, self.size = queries, stores, width // queries
        self.ask = nn.Linear(width, queries * self.size, bias=False)
        self.offer = nn.Linear(width, 2 * stores * self.size, bias=False)
        self.blend = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor, allowed: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.ask(x).view(batch, length, self.queries, self.size).transpose(1, 2)
        k, v = self.offer(x).view(batch, length, 2 * self.stores, self.size).transpose(1, 2).chunk(2, 1)
        q, k = turn(q, angles), turn(k, angles)
        share = self.queries // self.stores
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.blend(mixed.transpose(1, 2).reshape(batch, length, width))


class Stage(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, width: int, queries: int, stores: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer = Mixer(width, queries, stores)
        self.think = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, angles: Tensor, allowed: Tensor) -> Tensor:
        x = x + self.mixer(self.first(x), angles, allowed)
        return x + self.think(self.second(x))


class Storyteller(nn.Module):
    """tokens, real, places [B, T] -> scores [B, T, words]; `real` is False at padding, `places` count real tokens."""

    def __init__(self, words: int = 128, width: int = 32, stages: int = 3, queries: int = 4, stores: int = 2) -> None:
        super().__init__()
        self.words, self.stores = words, stores
        self.lookup = nn.Embedding(words, width)
        self.stages = nn.ModuleList(Stage(width, queries, stores) for _ in range(stages))
        self.final = nn.LayerNorm(width)
        size = width // queries
        self.register_buffer("pace", 100.0 ** (-torch.arange(0, size, 2) / size))

    def forward(self, tokens: Tensor, real: Tensor, places: Tensor) -> Tensor:
        x = self.lookup(tokens)
        angles = (places[:, None, :, None] * self.pace).to(x.dtype)
        length = tokens.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        allowed = past & real[:, None, None, :]
        allowed = allowed | ~real[:, None, :, None]  # padding sees everything, lest its softmax be empty
        for stage in self.stages:
            x = stage(x, angles, allowed)
        return self.final(x) @ self.lookup.weight.T


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [B, heads, T, size] by angles [B, 1, T, size / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def storyteller(dtype: torch.dtype = torch.float32) -> Storyteller:
    """A tiny one, seeded, with attention far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Storyteller()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.25) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()
