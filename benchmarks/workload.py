"""What the benchmark exchanges: DDP's own buckets for a model's shapes, and gradients for them.

Two sets of gradients alternate, so that a message formed against the last step's estimate is never
zero. No backward pass runs: a hook's cost does not depend on where gradients come from, and DDP's
copies into and out of its buckets are not the hook's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Shapes = list[tuple[int, ...]]
GRADIENT_SETS = 2


def gpt(layers: int = 12, width: int = 512, vocabulary: int = 6144, context: int = 256) -> Shapes:
    """A GPT-2-like language model, its output layer tied to its embedding: 41 M parameters."""
    norm = [(width,), (width,)]
    block = [
        *norm,
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        *norm,
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    ]
    return [(vocabulary, width), (context, width), *block * layers, *norm]


def vit_small(layers: int = 12, width: int = 384) -> Shapes:
    """ViT-S/16 for 224 x 224 images: 22 M parameters."""
    blocks = gpt(layers, width, vocabulary=1, context=1)[2:]
    return [
        (1, 1, width),
        (1, 197, width),
        (width, 3, 16, 16),
        (width,),
        *blocks,
        (1000, width),
        (1000,),
    ]


def resnet50() -> Shapes:
    """ResNet-50, convolutions and batch norms: 25.6 M parameters."""

    def convolution(outputs: int, inputs: int, size: int) -> Shapes:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes = convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, inputs, 1) + convolution(width, width, 3)
            shapes += convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def mlp(width: int = 2048, layers: int = 4) -> Shapes:
    """A plain perceptron on 784 inputs: 18 M parameters."""
    hidden = [(width, width), (width,)] * layers
    return [(width, 784), (width,), *hidden, (10, width), (10,)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "gpt": gpt,
    "resnet50": resnet50,
    "vit-small": vit_small,
    "mlp": mlp,
}


def squares(numel: int) -> Shapes:
    """Square matrices with a bias each, of at most 1024 rows: about ``numel`` elements in all."""
    side = max(1, min(1024, math.isqrt(numel // 4)))
    return [(side, side), (side,)] * max(1, round(numel / (side * (side + 1))))


class Parameters(nn.Module):
    """Parameters of given shapes and nothing else."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: str = "cpu") -> None:
        super().__init__()
        self.tensors = nn.ParameterList(
            nn.Parameter(torch.zeros(s, dtype=dtype, device=device)) for s in shapes
        )


class Workload:
    """DDP's buckets for some shapes, and every rank's gradients for them.

    Args:
        shapes: of the parameters.
        dtype: of parameters and gradients.
        bucket_mb: DDP's ``bucket_cap_mb``.
        device: of parameters and gradients, "cpu" or "cuda".

    Attributes:
        ddp: what the buckets belong to; to bind an `arc_topk.State` to.
        buckets: of type `dist.GradBucket`, in the order in which DDP hands them to its hook.
        numel: parameters in all.
    """

    def __init__(
        self, shapes: Shapes, dtype: torch.dtype, bucket_mb: float = 25, device: str = "cpu"
    ) -> None:
        # Without find_unused_parameters DDP begins with one bucket, divided after a first backward.
        self.ddp = DistributedDataParallel(
            Parameters(shapes, dtype, device), bucket_cap_mb=bucket_mb, find_unused_parameters=True
        )
        # How DDP itself makes buckets for a rank that has run out of data (`join`): with its layout
        # and its parameters, without a backward pass.
        self.buckets: list[dist.GradBucket] = self.ddp.reducer._get_zeros_like_grad_buckets()
        self.numel = sum(b.buffer().numel() for b in self.buckets)
        self._sets = self.gradients(dist.get_rank())

    def gradients(self, rank: int) -> list[list[Tensor]]:
        """A rank's gradients, the same at every call: [set][bucket], each like the bucket's buffer.

        Gaussian, the rows of a matrix of different length.
        """
        device = self.buckets[0].buffer().device
        generator = torch.Generator(device).manual_seed(rank + 1)
        sets = []
        for _ in range(GRADIENT_SETS):
            buffers = [torch.empty_like(b.buffer()) for b in self.buckets]
            for bucket, buffer in zip(self.buckets, buffers, strict=True):
                for g in split(bucket, buffer):
                    row_scale = torch.randn(len(g), generator=generator, device=device).exp_()
                    row_scale = row_scale.reshape(-1, *[1] * (g.dim() - 1))
                    noise = torch.randn(g.shape, generator=generator, device=device)
                    g.copy_(noise.mul_(row_scale))
            sets.append(buffers)
        return sets

    def gradient(self, step: int) -> list[Tensor]:
        """This rank's gradients of a step, a tensor a bucket."""
        return self._sets[step % GRADIENT_SETS]

    def mean_gradient(self, step: int) -> list[Tensor]:
        """All ranks' mean gradients of a step, a tensor a bucket."""
        ranks = dist.get_world_size()
        if ranks == 1:
            return self.gradient(step)
        own = [self.gradients(rank)[step % GRADIENT_SETS] for rank in range(ranks)]
        return [torch.stack(buffers).mean(dim=0) for buffers in zip(*own, strict=True)]

    def refill(self, step: int) -> None:
        """What DDP does before it calls the hook: the step's gradients are in the buckets."""
        for bucket, gradient in zip(self.buckets, self.gradient(step), strict=True):
            bucket.buffer().copy_(gradient)


def split(bucket: dist.GradBucket, flat: Tensor) -> list[Tensor]:
    """A bucket's tensor as views, one a parameter."""
    parameters = bucket.parameters()
    parts = flat.split([p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
