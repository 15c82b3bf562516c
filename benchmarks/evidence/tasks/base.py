"""What every task is made of."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A model, data and an optimizer; its fields are settings, and part of every run's key.

    Attributes:
        about: for the page, a sentence.
        unit: of the loss.
        steps: of a run.
        lrs, beta1s: the grid that every method is tuned on, the first beta1 first.
        clip: largest gradient norm, behind the exchange; None: no clipping.
        warmup: steps of rising learning rate, before its cosine.
        needs: packages that requirements/evidence.txt names and that need not be installed.
        weighs_residuals: one more forward and backward pass at each checkpoint is no matter.
        seconds: a guess of a step's over 4 ranks, until there are results.
    """

    about: ClassVar[str]
    unit: ClassVar[str] = "nats"
    lrs: ClassVar[tuple[float, ...]]
    beta1s: ClassVar[tuple[float, ...]]
    clip: ClassVar[float | None] = None
    warmup: ClassVar[int] = 0
    needs: ClassVar[tuple[str, ...]] = ()
    weighs_residuals: ClassVar[bool] = False
    seconds: ClassVar[float] = 0.1
    steps: int

    def settings(self) -> dict[str, Any]:
        """What a run's key holds of it; ``steps`` is the run's."""
        fields = dataclasses.asdict(self)
        del fields["steps"]
        return fields

    def schedule(self, step: int, steps: int) -> float:
        """Share of the highest learning rate at a step from 0 on: linear up, then half a cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, steps - self.warmup)))

    def missing(self) -> list[str]:
        """Packages that are needed and not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    @abstractmethod
    def model(self) -> nn.Module:
        """Maps a batch to its mean loss; drawn from torch's global generator."""

    @abstractmethod
    def optimizer(
        self, parameters: Iterable[nn.Parameter], lr: float | None, beta1: float | None
    ) -> Optimizer:
        """With beta1 as its momentum."""

    @abstractmethod
    def batches(self, rank: int, ranks: int, seed: int) -> Iterator[Any]:
        """A rank's training batches, without end."""

    @abstractmethod
    def validation(self) -> Sequence[Any]:
        """The validation batches, always the same and equally large."""
