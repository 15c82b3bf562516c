"""Synthetic quadratics whose optima differ from rank to rank: what error feedback has to get right.

f_i(X) = 1/2 sum a (X - B_i)^2 over the elements of a 64 x 32 matrix; the curvatures a are the same
on every rank, the optima B_i are not: their differences are as large as their mean. The
loss is f / f0 of the mean f, above its least: 1 at the start, 0 where all is learnt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from evidence.tasks.base import Task

SHAPE = (64, 32)
RANKS = 16  # whose optima are drawn; N ranks take the first N
DIFFERENCES = 1.0


def curvatures() -> Tensor:
    """A, from 0.1 to 1, log-uniform."""
    return 10 ** -torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))


def optima(ranks: int) -> Tensor:
    """B_1 .. B_N, whose mean is the same for every N."""
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(SHAPE, generator=generator)
    differences = torch.randn((RANKS, *SHAPE), generator=generator)[:ranks]
    return mean + DIFFERENCES * (differences - differences.mean(dim=0))


class Quadratic(nn.Module):
    """The matrix X; a batch is an optimum and a divisor of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(SHAPE))
        self.register_buffer("a", curvatures())

    def forward(self, batch: tuple[Tensor, float]) -> Tensor:
        """1/2 sum a (X - B)^2 / divisor."""
        optimum, divisor = batch
        return 0.5 * (self.a * (self.x - optimum).square()).sum() / divisor


@dataclass(frozen=True, kw_only=True)
class Quadratics(Task):
    """SGD at a constant learning rate, without momentum.

    Attributes:
        noise: standard deviation of every gradient's noise before the curvature, a rank and step.
    """

    about: ClassVar[str] = (
        "Quadratics whose optima differ from rank to rank, SGD at a constant learning rate, f / f0"
    )
    unit: ClassVar[str] = "f / f0"
    lrs: ClassVar[tuple[float, ...]] = (0.1,)
    beta1s: ClassVar[tuple[float, ...]] = (0.0,)
    seconds: ClassVar[float] = 0.02
    noise: float
    steps: int = 1000

    def schedule(self, step: int, steps: int) -> float:
        """Constant."""
        return 1.0

    def model(self) -> nn.Module:
        """X = 0."""
        return Quadratic()

    def optimizer(
        self, parameters: Iterable[nn.Parameter], lr: float | None, beta1: float | None
    ) -> Optimizer:
        """SGD."""
        return SGD(parameters, lr or 0.0)

    def batches(self, rank: int, ranks: int, seed: int) -> Iterator[tuple[Tensor, float]]:
        """This rank's optimum, with noise of its own."""
        optimum = optima(ranks)[rank]
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        while True:
            noise = self.noise * torch.randn(SHAPE, generator=generator) if self.noise else 0.0
            yield optimum + noise, 1.0

    def validation(self) -> Sequence[tuple[Tensor, float]]:
        """The mean optimum."""
        mean = optima(1)[0]  # of one rank: the mean itself
        return [(mean, float(Quadratic()((mean, 1.0))))]
