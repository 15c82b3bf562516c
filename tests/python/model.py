"""A DDP model whose gradients are whatever a test wants, and the loop that runs it on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from device import DEVICE, copy_to
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Gradients a step, a rank, a tensor. None: the rank does not use the parameter in that step.
Gradients = list[list[list[Tensor | None]]]


class Pick(nn.Module):
    """Parameters only. Its loss is sum(p * g), so the gradient of p is g, to the bit.

    Parameters are used in an order of their own, so that DDP's rebuilt buckets hold other
    parameters side by side than its first ones.
    """

    def __init__(self, layouts: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(torch.zeros_like(t)) for t in layouts)

    def forward(self, gradients: Sequence[Tensor | None]) -> Tensor:
        used = [(p, g) for p, g in zip(self.tensors, gradients, strict=True) if g is not None]
        mixed = used[1::2] + used[::2]
        return torch.stack([(p * g).sum().double() for p, g in mixed]).sum()


def random_gradients(
    layouts: Sequence[Tensor], world_size: int, steps: int, dtype: torch.dtype, seed: int = 0
) -> Gradients:
    """Gaussian, with a part that all ranks share, as gradients have."""
    generator = torch.Generator().manual_seed(seed)

    def gradient(layout: Tensor, common: Tensor) -> Tensor:
        noise = torch.randn(layout.shape, generator=generator)
        return torch.empty_like(layout, dtype=dtype, device="cpu").copy_(common + noise)

    steps_: Gradients = []
    for _ in range(steps):
        commons = [torch.randn(t.shape, generator=generator) for t in layouts]
        steps_.append(
            [
                [gradient(t, c) for t, c in zip(layouts, commons, strict=True)]
                for _ in range(world_size)
            ]
        )
    return steps_


def wrap(layouts: Sequence[Tensor], dtype: torch.dtype, **ddp: Any) -> DistributedDataParallel:
    return DistributedDataParallel(
        Pick([torch.zeros_like(t, dtype=dtype, device=DEVICE) for t in layouts]), **ddp
    )


def backward(
    model: DistributedDataParallel, gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """One synchronised backward: the averaged gradient of every parameter, on the CPU."""
    model.zero_grad(set_to_none=True)
    model(copy_to(DEVICE, gradients)).backward()
    return copy_to("cpu", (p.grad for p in model.module.tensors))
