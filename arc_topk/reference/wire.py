"""The wire: what narrowing a value to the wire's type does to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arc_topk.reference.levels import MOST_RANKS


@dataclass(frozen=True)
class Wire:
    """What happens to a value on its way: rounded to the wire's type, summed, divided by N.

    The sum of N values may overflow though none of them does, so they are scaled by
    2^-ceil(log2 N) before they are summed. In float16 they are clamped to its largest finite number
    65504 before. (A clamp after the scaling would not do: N times 65504 overflows.) Infinities and
    NaN pass.

    Attributes:
        dtype: type that travels.
        world_size: N.
        work: float32, or float64 for float64 gradients: the type of what comes back.
        summed: False where values are gathered rather than summed, hence need no scale.
    """

    dtype: torch.dtype
    world_size: int
    work: torch.dtype
    summed: bool = True

    @property
    def scale(self) -> float:
        """The power of two that the values are divided by before they are summed."""
        return 2.0 ** math.ceil(math.log2(self.world_size)) if self.summed else 1.0

    def send(self, x: Tensor, rank: int = 0) -> Tensor:
        """The values as they travel, in `dtype`: the same from every rank."""
        if self.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            x = torch.where(x.isinf(), x, x.clamp(-largest, largest))
        return (x / self.scale).to(self.dtype)

    def value(self, sent: Tensor) -> Tensor:
        """What was sent, in the work type and at its own scale: the part that counts as sent."""
        return sent.to(self.work) * self.scale

    def mean(self, sent: Sequence[Tensor]) -> Tensor:
        """The mean over ranks of what was sent. A sum on the wire is rounded to the wire's type."""
        total = torch.stack(list(sent)).double().sum(dim=0)
        total = total.to(self.dtype if self.summed else self.work).to(self.work)
        return total / (self.world_size / self.scale)

    def fitted(self, x: Sequence[Tensor], rows: Tensor) -> Wire:
        """The wire of selected rows: the same for all."""
        return self


def wire_type(asked: torch.dtype, world_size: int) -> torch.dtype:
    """What rows travel in: bytes have too few levels for many ranks, and bfloat16 is better."""
    if asked == torch.uint8 and world_size > MOST_RANKS:
        return torch.bfloat16
    return asked
