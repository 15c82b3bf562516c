"""ARC-Top-K as one would write it in Python: a DDP hook of torch operations, tensor by tensor.

The baseline of the benchmark. It does the algorithm of `arc_topk` with the same number of
collectives, in torch's own operations, in place where torch offers that.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor


class PythonArcTopK:
    """State of `python_arc_topk_hook`, by parameter.

    Args:
        ratio: kept share of a matrix's rows.
        feedback: "none", "ef14", "ef21" or "ef21m".
        sketch_dim: r, columns of the sketch.
        eta: EF21M's momentum.
    """

    def __init__(self, ratio: float, feedback: str, sketch_dim: int = 4, eta: float = 0.1) -> None:
        self.ratio, self.feedback, self.sketch_dim = ratio, feedback, sketch_dim
        self.eta = eta if feedback == "ef21m" else 1.0
        self.generator: torch.Generator | None = None
        self.error: dict[Tensor, Tensor] = {}  # EF14: e
        self.tracker: dict[Tensor, Tensor] = {}  # EF21M: v
        self.own: dict[Tensor, Tensor] = {}  # EF21, EF21M: h_i
        self.shared: dict[Tensor, Tensor] = {}  # EF21, EF21M: h

    def projection(self, n: int, like: Tensor) -> Tensor:
        """V, n x r, the same on all ranks; type and device are those of ``like``."""
        if self.generator is None:
            self.generator = torch.Generator(like.device).manual_seed(0)
        shape = (n, self.sketch_dim)
        return torch.randn(shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def message(self, p: Tensor, g: Tensor) -> Tensor:
        """X_i of one matrix."""
        if self.feedback == "ef14":
            if p not in self.error:
                self.error[p] = torch.zeros_like(g)
            return self.error[p].add_(g)
        if self.feedback == "ef21":
            return g - self.own[p]
        if self.feedback == "ef21m":
            return self.tracker[p].lerp_(g, self.eta) - self.own[p]
        return g

    def finish(self, p: Tensor, rows: Tensor, sent: Tensor, mean: Tensor, out: Tensor) -> None:
        """Error feedback after the exchange; writes what DDP gets into ``out``."""
        if self.feedback in ("ef21", "ef21m"):
            self.own[p].index_add_(0, rows, sent)
            self.shared[p].index_add_(0, rows, mean)
            out.copy_(self.shared[p])
            return
        if self.feedback == "ef14":
            self.error[p].index_fill_(0, rows, 0)
        out.zero_().index_copy_(0, rows, mean.to(out.dtype))

    def start(self, p: Tensor, g: Tensor, mean: Tensor) -> None:
        """The dense first step of EF21 and EF21M."""
        self.own[p] = g.clone()
        self.shared[p] = mean.clone()
        if self.feedback == "ef21m":
            self.tracker[p] = g.clone()


@torch.no_grad()
def python_arc_topk_hook(
    state: PythonArcTopK, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """Two all-reduces a bucket, both waited for: issued from callbacks they may cross on Gloo."""
    world_size = dist.get_world_size()
    # Matrices with rows along dimension 0; what has fewer than two dimensions goes as it is.
    pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
    matrices = [(p, g.view(len(g), -1)) for p, g in pairs if p.dim() > 1]
    vectors = [g for p, g in pairs if p.dim() <= 1]
    work = torch.promote_types(bucket.buffer().dtype, torch.float32)

    if state.feedback in ("ef21", "ef21m") and any(p not in state.own for p, _ in matrices):
        own = [g.to(work, copy=True) for _, g in matrices]
        dist.all_reduce(bucket.buffer().div_(world_size))
        for (p, mean), g in zip(matrices, own, strict=True):
            state.start(p, g, mean.to(work))
        return completed(bucket.buffer())

    messages = [state.message(p, g.to(work)) for p, g in matrices]
    sketches = []
    for x in messages:
        v = state.projection(x.shape[1], x)
        sketches.append(x @ v.div_(math.sqrt(state.sketch_dim)))
    first = average([*sketches, *[g.to(work) for g in vectors]], world_size)
    for g, mean in zip(vectors, first[len(sketches) :], strict=True):
        g.copy_(mean)

    selected = []
    for sketch in first[: len(sketches)]:
        k = math.ceil(state.ratio * len(sketch) * (1 - 1e-12))
        selected.append(sketch.square().sum(dim=1).topk(k).indices)
    sent = [x.index_select(0, rows) for x, rows in zip(messages, selected, strict=True)]
    means = average(sent, world_size)
    for (p, g), rows, own, mean in zip(matrices, selected, sent, means, strict=True):
        state.finish(p, rows, own, mean, g)
    return completed(bucket.buffer())


def average(tensors: list[Tensor], world_size: int) -> list[Tensor]:
    """Means over ranks, by one all-reduce of all tensors together."""
    if not tensors:
        return []
    payload = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(payload)
    parts = payload.div_(world_size).split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def completed(result: Tensor) -> torch.futures.Future[Tensor]:
    """A future that is done."""
    devices = [result.device] if result.is_cuda else None
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
    future.set_result(result)
    return future
