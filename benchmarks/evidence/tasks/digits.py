"""scikit-learn's handwritten digits with a small ResNet: a sanity check of convolutions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer

from evidence.tasks.base import Task

BATCH, TRAINING = 8, 1347
CHANNELS = 32

Batch = tuple[Tensor, Tensor]


@functools.cache
def data() -> Batch:
    """1797 images of 8 x 8 pixels, in one fixed shuffled order, and their classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(digits.target, dtype=torch.int64)[order]


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a way past them; group norm, which has no running averages."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm_first = nn.GroupNorm(8, CHANNELS)
        self.norm_second = nn.GroupNorm(8, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, channels, 8, 8) to the same shape."""
        y = functional.relu(self.norm_first(self.first(x)))
        return functional.relu(x + self.norm_second(self.second(y)))


class ResNet(nn.Module):
    """Five convolutions; maps images and classes to the mean cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.blocks = nn.Sequential(Residual(), Residual())
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, batch: Batch) -> Tensor:
        """The loss, in nats an image."""
        images, classes = batch
        x = self.blocks(functional.relu(self.stem(images)))
        return functional.cross_entropy(self.head(x.mean(dim=(2, 3))), classes)


@dataclass(frozen=True, kw_only=True)
class Digits(Task):
    """SGD with momentum."""

    about: ClassVar[str] = (
        "Sanity check of convolutions: scikit-learn's digits, small ResNet, SGD with momentum"
    )
    unit: ClassVar[str] = "nats an image"
    lrs: ClassVar[tuple[float, ...]] = (0.03, 0.1, 0.3)
    beta1s: ClassVar[tuple[float, ...]] = (0.9, 0.0)
    needs: ClassVar[tuple[str, ...]] = ("sklearn",)
    warmup: ClassVar[int] = 20
    seconds: ClassVar[float] = 0.06
    steps: int = 200

    def model(self) -> nn.Module:
        """A ResNet of 40,000 parameters."""
        return ResNet()

    def optimizer(
        self, parameters: Iterable[nn.Parameter], lr: float | None, beta1: float | None
    ) -> Optimizer:
        """SGD."""
        return SGD(parameters, lr or 0.0, momentum=beta1 or 0.0)

    def batches(self, rank: int, ranks: int, seed: int) -> Iterator[Batch]:
        """8 images, drawn with replacement."""
        images, classes = data()
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        while True:
            rows = torch.randint(TRAINING, (BATCH,), generator=generator)
            yield images[rows], classes[rows]

    def validation(self) -> Sequence[Batch]:
        """450 images."""
        images, classes = data()
        ranges = [slice(i, i + 45) for i in range(TRAINING, len(images), 45)]
        return [(images[rows], classes[rows]) for rows in ranges]
