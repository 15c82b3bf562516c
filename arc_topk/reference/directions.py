"""Low rank on bytes: the first factor as directions, beside which the ranks' norms travel.

No unit for P_i = X_i W can be agreed upon before it is sent, and none is needed: the length of no
column matters to P^ = orth(P). So each rank sends its own columns at unit norm, in a unit that
follows from m and N alone, and their norms beside them: two bytes in a place of each rank's own,
which an all-reduce adds to zeros. They make the units of the second factor's columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arc_topk.reference.levels import RowLevels, best_step, most_level, reach, stagger, unit_of


@dataclass(frozen=True)
class Directions:
    """What happens to both factors on an uint8 wire.

    Attributes:
        world_size: N, at most `MOST_RANKS`.
        work: float32 or float64: the type of units and of what comes back.
    """

    world_size: int
    work: torch.dtype

    def step(self, m: int) -> float:
        """The unit of a column of m at unit norm: levels reach A(L) root mean squares of it."""
        return min(reach(self.world_size) / math.sqrt(m), 1.0) / most_level(self.world_size)

    def norms(self, columns: Sequence[Tensor]) -> Tensor:
        """[N, k], norms of the columns of each rank's [m, k]; of one that has overflowed 0."""
        own = torch.stack([c.double().norm(dim=0) for c in columns]).to(self.work)
        return torch.where(own.isfinite(), own, 0.0)

    def summed(self, p: Sequence[Tensor], norms: Tensor) -> Tensor:
        """The sum over ranks of the levels of P_i's columns [m, k], in the work type."""
        h, m = most_level(self.world_size), p[0].shape[0]
        total = torch.zeros(p[0].shape, dtype=self.work)
        for rank, (own, norm) in enumerate(zip(p, norms, strict=True)):
            unit = (norm.double() * self.step(m)).to(self.work)
            usable = unit >= torch.finfo(self.work).tiny
            inverse = torch.where(usable, 1 / torch.where(usable, unit, 1.0), 0.0)
            x = torch.where(own.isfinite(), own, 0.0).to(self.work)
            total += (x * inverse + stagger(rank, self.world_size)).clamp(-h, h).round()
        return total

    def units(self, norms: Tensor, summed: Tensor, n: int) -> RowLevels:
        """The codec of R's columns [n, k].

        Along column c of W, R_i is as long as the mean ||P_c||. Beside it lies noise of the ranks'
        own: with v the variance of an element, ||P_i,c||^2 is about ||P_c||^2 + (1 - 1/N) m v, and
        ||R_i,c||^2 about ||P_c||^2 + n v, once W has settled. The levels reach A(L) of its root
        mean squares: too wide a unit costs less than one that cuts off. Ranks whose column is zero
        count for nothing.
        """
        h, m = most_level(self.world_size), summed.shape[0]
        mean, count = self._mean(norms)
        step = self.step(m) / count.clamp_min(1)
        every = mean.square()
        shared = every * summed.double().square().sum(dim=0) * step.square()
        noise = (every - shared).clamp_min(0) / (1 - 1 / count.clamp_min(2))
        noise = torch.where(count > 1, noise, 0.0)
        unit = reach(self.world_size) / h * (shared / n + noise / m).sqrt()
        return RowLevels(self.world_size, unit_of(unit.to(self.work), self.world_size))

    def unit_of_row(self, norms: Tensor, n: int) -> RowLevels:
        """The codec of a matrix of one row, whose root mean square the norms tell."""
        mean, _ = self._mean(norms)
        unit = best_step(most_level(self.world_size)) / math.sqrt(n) * mean
        return RowLevels(self.world_size, unit_of(unit.to(self.work), self.world_size))

    def _mean(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Over the ranks that have any, and how many these are, as the two bytes of each tell."""
        told = first_two_bytes(norms).double()
        count = (told > 0).sum(dim=0)
        return told.sum(dim=0) / count.clamp_min(1), count


def first_two_bytes(norms: Tensor) -> Tensor:
    """What is left of numbers once all but their first 16 bits are zero."""
    double = norms.dtype == torch.float64
    integer, rest = (torch.int64, 48) if double else (torch.int32, 16)
    return (norms.view(integer) >> rest << rest).view(norms.dtype)
