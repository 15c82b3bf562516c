"""Who takes part: the hooks that are compared, each with its state and what was measured of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from python_hook import PythonArcTopK, python_arc_topk_hook
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from workload import Workload

import arc_topk

Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[Any]]

COMPRESSORS = ("arc_topk", "low_rank", "rand_k", "top_k", "dense")
BASELINES = ("python", "powersgd")
COLUMNS = 4  # of the factors of low rank and of PowerSGD


@dataclass
class Contestant:
    """A hook with its state, and what was measured of it, a number a round.

    Attributes:
        name: a compressor's, a baseline's, or "DDP".
        hook, state: as for ``DistributedDataParallel.register_comm_hook``.
        seconds: from the first bucket's hook call to the last completed future.
        compute: those without the collectives; empty where it is not known.
        phases: `arc_topk.State.metrics`'s seconds.
        bandwidth: of the streaming update just before; empty with several ranks.
    """

    name: str
    hook: Hook
    state: Any
    seconds: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)

    def exchange(self, buckets: Sequence[dist.GradBucket], in_flight: bool) -> list[Tensor]:
        """Averages all buckets, together if ``in_flight``, else one after the other."""
        if not in_flight:
            return [tensor_of(self.hook(self.state, bucket).wait()) for bucket in buckets]
        futures = [self.hook(self.state, bucket) for bucket in buckets]
        return [tensor_of(future.wait()) for future in futures]


def tensor_of(value: Any) -> Tensor:
    """A hook's future holds a tensor or a list of one."""
    tensor: Tensor = value[0] if isinstance(value, (list, tuple)) else value
    return tensor


def make_contestant(
    name: str,
    workload: Workload,
    feedback: str,
    ratio: float,
    columns: int = COLUMNS,
    wire: str | None = None,
) -> Contestant:
    """The hook called ``name``, without any state; ``wire``: a dtype's name, or the gradient's."""
    if name == "DDP":
        return Contestant(name, allreduce_hook, dist.group.WORLD)
    if name == "python":
        return Contestant(name, python_arc_topk_hook, PythonArcTopK(ratio, feedback))
    if name == "powersgd":
        # Only on one rank: it issues collectives from callbacks, which may run in another order on
        # another rank, and Gloo, which pairs collectives by order, then aborts.
        state = PowerSGDState(
            dist.group.WORLD, matrix_approximation_rank=columns, start_powerSGD_iter=2
        )
        return Contestant(name, powerSGD_hook, state)
    # Dense stands for plain averaging, whatever the others remember.
    config = arc_topk.Config(
        compressor=name,
        feedback="none" if name == "dense" else feedback,
        ratio=ratio,
        rank=columns if name == "low_rank" else None,
        wire_dtype=getattr(torch, wire) if wire else next(workload.ddp.parameters()).dtype,
    )
    return Contestant(name, arc_topk.arc_topk_hook, arc_topk.State(config).bind(workload.ddp))


def contestants_of(args: argparse.Namespace, feedback: str, verified: bool = False) -> list[str]:
    """Names in the order in which they take turns; ``verified``: without those of torch's own."""
    names = [*args.compressors, *args.baselines]
    if feedback not in ("ef14", "none"):
        names = [name for name in names if name != "low_rank"]
    if args.ranks > 1:
        names = ["DDP", *(name for name in names if name != "powersgd")]
    return [n for n in names if n not in ("DDP", "powersgd")] if verified else names
