"""What all scripts do: train in one go, train with a stop, compare."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

FOLDER = Path(sys.argv[1])  # of this run, the same on all ranks
STEPS, HALF = 6, 3
CONFIG = {"ratio": 0.2, "feedback": "ef14"}


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Numbers, and what a fixed linear map makes of them."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(steps * 8, 24, generator=generator)
        self.targets = self.inputs @ torch.randn(24, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index], "targets": self.targets[index]}


class Model(nn.Module):
    """Two matrices that are worth compressing; its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 3))

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(inputs), targets)}


def parameters_of(model: nn.Module) -> list[Tensor]:
    """Copies."""
    return [p.detach().clone() for p in model.parameters()]


def finish(straight: list[Tensor], stopped: list[Tensor], plain: list[Tensor]) -> None:
    """Both runs must have ended in the same bits, and elsewhere than plain DDP.

    Prints what this rank ends with: whoever started the ranks compares them. A collective here
    would be the process's last act, and torch (2.15) aborts at exit where a Gloo thread only then
    lets go of a tensor of Python's.
    """
    for a, b in zip(straight, stopped, strict=True):
        assert torch.equal(a, b), "a stop changes the run"
    same = all(torch.equal(a, b) for a, b in zip(straight, plain, strict=True))
    assert not same, "nobody calls us"
    flat = torch.cat([p.reshape(-1) for p in straight])
    # One write, the end of the line in it: all ranks have the same pipe.
    digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    print(f"as expected {digest}\n", end="", flush=True)
