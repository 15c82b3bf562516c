"""LLaMA-like models in the sizes of the paper's Table V (arXiv 2510.26709), in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Size:
    """Hidden size, perceptron's width, heads, layers, vocabulary."""

    width: int
    inner: int
    heads: int
    layers: int
    vocabulary: int = 32000


SIZES = {
    "1m": Size(128, 344, 4, 2, 512),  # for a quick look
    "25m": Size(512, 1376, 8, 6, 6400),  # not the paper's: what a small machine trains in a second
    "60m": Size(512, 1376, 8, 8),
    "130m": Size(768, 2048, 12, 12),
    "350m": Size(1024, 2736, 16, 24),
}
ROTATION_BASE = 10000.0


def rotated(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on (batch, heads, length, size of a head)."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequencies = ROTATION_BASE ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Causal attention with rotary positions, then a gated perceptron; norms before both."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm_attention = nn.RMSNorm(size.width)
        self.q, self.k, self.v, self.out = (
            nn.Linear(size.width, size.width, bias=False) for _ in range(4)
        )
        self.norm_mlp = nn.RMSNorm(size.width)
        self.gate = nn.Linear(size.width, size.inner, bias=False)
        self.up = nn.Linear(size.width, size.inner, bias=False)
        self.down = nn.Linear(size.inner, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps hidden states (batch, length, width) to new ones."""
        batch, length, width = x.shape
        normed = self.norm_attention(x)
        q, k, v = (
            part(normed).view(batch, length, self.heads, -1).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        heads = functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).reshape(batch, length, width))
        normed = self.norm_mlp(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Llama(nn.Module):
    """Maps tokens (batch, length + 1) to the mean loss of predicting each from those before.

    Args:
        size: one of `SIZES`.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss, in nats."""
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def shapes(size: Size) -> list[tuple[int, ...]]:
    """Of its parameters, without making them."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in Llama(size).parameters()]
