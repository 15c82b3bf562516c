"""A small byte-level transformer language model, in plain PyTorch.

Nothing here knows of distributed training: it is the model that ``train_ddp.py`` trains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BYTES = 256  # the vocabulary: every value of a byte


class Block(nn.Module):
    """Pre-norm transformer block: causal self-attention, then a two-layer perceptron."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps hidden states of shape (batch, length, width) to new ones."""
        batch, length, width = x.shape
        heads = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm_attention(x)).view(heads).permute(2, 0, 3, 1, 4)
        drop = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True)
        attended = self.out(attended.transpose(1, 2).reshape(batch, length, width))
        x = x + functional.dropout(attended, drop)
        return x + functional.dropout(self.down(functional.gelu(self.up(self.norm_mlp(x)))), drop)


class ByteTransformer(nn.Module):
    """Predicts the next byte of a text.

    Args:
        context: longest sequence the model reads, in bytes.
        width: elements of a hidden state; a multiple of ``heads``.
        layers: number of transformer blocks.
        heads: attention heads of each block.
        dropout: probability, in [0, 1), of dropping an element where a block joins the residual.

    Raises:
        ValueError: ``width`` is not a multiple of ``heads``.
    """

    def __init__(
        self, context: int, width: int, layers: int, heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width must be a multiple of heads, got width={width} and heads={heads}: "
                "choose --width as a multiple of --heads"
            )
        self.embedding = nn.Embedding(BYTES, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Mean cross-entropy of every byte given the bytes before it.

        Args:
            text: integer tensor of shape (batch, length + 1), length at most ``context``.

        Returns:
            The loss, a scalar tensor, in nats a byte.
        """
        seen, target = text[:, :-1], text[:, 1:]
        x = self.embedding(seen) + self.position[: seen.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), target.flatten())
