"""The example's language model: next byte of the standard library's source."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from text import Windows, load
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformer import ByteTransformer

from evidence.tasks.base import Task

CONTEXT, HEADS, BATCH = 64, 4, 8
VALIDATION_BATCHES, VALIDATION_BATCH = 32, 32


@dataclass(frozen=True, kw_only=True)
class Language(Task):
    """A byte-level transformer, as examples/train_ddp.py trains it."""

    about: ClassVar[str] = "Byte-level transformer on the standard library's source, AdamW"
    unit: ClassVar[str] = "nats a byte"
    lrs: ClassVar[tuple[float, ...]] = (5e-3, 1e-2, 2e-2)
    beta1s: ClassVar[tuple[float, ...]] = (0.5, 0.0, 0.9)
    clip: ClassVar[float | None] = 1.0
    warmup: ClassVar[int] = 50
    weighs_residuals: ClassVar[bool] = True
    width: int
    layers: int
    steps: int

    def model(self) -> nn.Module:
        """The example's."""
        return ByteTransformer(CONTEXT, self.width, self.layers, HEADS)

    def optimizer(
        self, parameters: Iterable[nn.Parameter], lr: float | None, beta1: float | None
    ) -> Optimizer:
        """AdamW, the example's."""
        return AdamW(parameters, lr or 0.0, (beta1 or 0.0, 0.99), weight_decay=0.01)

    def batches(self, rank: int, ranks: int, seed: int) -> Iterator[Tensor]:
        """8 windows of 65 bytes."""
        windows = Windows(load(None)[0], CONTEXT, BATCH, rank, ranks, seed)
        while True:
            yield windows.next()

    def validation(self) -> Sequence[Tensor]:
        """1024 windows."""
        return _validation()


@functools.cache
def _validation() -> list[Tensor]:
    windows = Windows(load(None)[1], CONTEXT, VALIDATION_BATCH, 0, 1, seed=0)
    return [windows.next() for _ in range(VALIDATION_BATCHES)]
