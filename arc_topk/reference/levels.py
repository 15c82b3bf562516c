"""The uint8 wire: small integers, whose sum over ranks is exact in any order.

N ranks have L = floor(255 / N) + 1 levels each, one less where that is even, so that zero is one:
-h .. h with h = (L - 1) / 2, and the sum of N bytes u = level + h is at most 2 h N <= 255. All
ranks divide row j by the same unit D_j, c_L times the mean over ranks of the row's own root mean
square; c_L is the best uniform step of L levels for a Gaussian (Max, "Quantizing for Minimum
Distortion", 1960). Low rank's columns have a unit each: directions.py. What is rounded and cut off
stays in the error feedback.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_RANKS = 32


def most_level(world_size: int) -> int:
    """The largest level h of each of N ranks."""
    levels = 255 // world_size + 1
    return (levels - (levels % 2 == 0) - 1) // 2


@functools.cache
def best_step(most: int) -> float:
    """The step c of levels -most .. most that has the least mean squared error for N(0, 1).

    With Q(x) = c k(x) that error is stationary where c = E[x k] / E[k^2]. (It is continuous where x
    passes from one level to the next, so that these boundaries' own motion adds nothing.) Rounded
    to six places, so that another implementation can take the very same constants.
    """

    def slope(c: float) -> float:
        density = [math.exp(-(((k - 0.5) * c) ** 2) / 2) for k in range(1, most + 1)] + [0.0]
        above = [math.erfc((k - 0.5) * c / math.sqrt(2)) / 2 for k in range(1, most + 1)] + [0.0]
        total = 0.0
        for k in range(1, most + 1):
            total += k * (density[k - 1] - density[k]) / math.sqrt(2 * math.pi)
            total -= c * k * k * (above[k - 1] - above[k])
        return total

    low, high = 1e-3, 4.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return round(low, 6)


@dataclass(frozen=True)
class Levels:
    """What happens to rows on their way, as `Wire` says it of other types.

    Attributes:
        world_size: N, at most `MOST_RANKS`.
        work: float32 or float64: the type of units and of what comes back.
        numel: d of the tensor, whose last row may be short: a row's root mean square is over the
            elements that it has.
        sketch: the type that units travel in; None: the work type.
    """

    world_size: int
    work: torch.dtype
    numel: int
    sketch: torch.dtype | None = None

    def fitted(self, x: Sequence[Tensor], rows: Tensor) -> RowLevels:
        """The units of the selected rows of the messages [m, n]."""
        n = x[0].shape[1]
        count = (self.numel - rows * n).clamp(max=n)
        share = best_step(most_level(self.world_size)) / self.world_size
        own = [(xi[rows].double().square().sum(dim=1) / count).sqrt() * share for xi in x]
        total = total_of(own, self.work, self.sketch)
        return RowLevels(self.world_size, unit_of(total, self.world_size)[:, None])


def reach(world_size: int) -> float:
    """A(L), rounded to six places as `best_step` is."""
    return round(min(7.0, 1.05 * math.log2(2 * most_level(world_size) + 1) + 0.4), 6)


def total_of(shares: Sequence[Tensor], work: torch.dtype, sketch: torch.dtype | None) -> Tensor:
    """The sum of what all ranks send in the first collective, rounded as its type rounds."""
    sketch = sketch or work
    total = torch.stack([s.to(work).to(sketch) for s in shares]).double().sum(dim=0)
    return total.to(sketch).to(work)


def stagger(rank: int, world_size: int) -> float:
    """s_i, by which the thresholds between a rank's levels are moved: their sum is zero.

    Where all ranks have the same x, the sum of their levels is N x / D to within one level
    (Hermite's identity), as if it had been rounded once; else all would err alike.
    """
    return (rank + 0.5) / world_size - 0.5


def unit_of(total: Tensor, world_size: int) -> Tensor:
    """The unit of a row from the summed shares of all ranks: eight of its last bits are zero.

    So its product with a level is exact. Too small a sum gives 0, by which nothing is sent; too
    large a one is cut off, so that the largest level is a finite number.
    """
    limits = torch.finfo(total.dtype)
    integer = torch.int64 if total.dtype == torch.float64 else torch.int32
    held = total.clamp(max=limits.max / (most_level(world_size) + 1))
    short = (held.view(integer) & ~0xFF).view(total.dtype)
    return torch.where(total >= limits.tiny, short, torch.zeros_like(short))


@dataclass(frozen=True)
class RowLevels:
    """The codec of some rows, or of columns.

    Attributes:
        world_size: N.
        unit: D, [K, 1] or [k], in the work type.
    """

    world_size: int
    unit: Tensor

    def send(self, x: Tensor, rank: int) -> Tensor:
        """The bytes of x, u = clamp(round(x / D + s_i), -h, h) + h."""
        h = most_level(self.world_size)
        inverse = torch.where(self.unit > 0, 1 / self.unit, 0)
        level = (x * inverse + stagger(rank, self.world_size)).clamp(-h, h).round()
        return (level + h).to(torch.uint8)

    def value(self, sent: Tensor) -> Tensor:
        """The part that counts as sent, D (u - h)."""
        return self.unit * (sent.to(self.unit.dtype) - most_level(self.world_size))

    def mean(self, sent: Sequence[Tensor]) -> Tensor:
        """The mean over ranks of what was sent, D (sum u / N - h)."""
        total = torch.stack(list(sent)).sum(dim=0)
        if total.max() > 255:
            raise OverflowError(f"a sum of {len(sent)} bytes is {int(total.max())}")
        zero = self.world_size * most_level(self.world_size)
        return self.unit / self.world_size * (total.to(self.unit.dtype) - zero)
