"""All ranks agree, or all ranks raise the same error: checked once, before anything is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

import arc_topk
from arc_topk.config import Config
from arc_topk.groups import current
from arc_topk.meeting import WAIT, meet

Sizes = tuple[int, ...]
Tensors = Sequence[tuple[str, Sizes, str, Sizes]]
T = TypeVar("T")


def describe_tensors(named: Sequence[tuple[str, torch.Tensor]]) -> Tensors:
    """(name, shape, dtype, strides) of each tensor, the strides as its gradient's will be."""
    return [
        (name, tuple(tensor.shape), str(tensor.dtype), _strides(tensor)) for name, tensor in named
    ]


def _strides(tensor: torch.Tensor) -> Sizes:
    if tensor.layout != torch.strided:
        return ()
    like = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    sizes_and_strides = zip(like.shape, like.stride(), strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in sizes_and_strides)


def agree(
    config: Config | None,
    tensors: Tensors,
    error: Exception | None,
    group: dist.ProcessGroup,
    *,
    call: str,
    wait: timedelta,
    device: torch.device,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Compares versions, configuration and tensors across the ranks of ``group``: a collective.

    Args:
        config: this rank's, or None if ``error`` is given.
        tensors: this rank's, by `describe_tensors`.
        error: what this rank found wrong by itself. It is raised here; the other ranks learn of it,
            so that none of them waits for a rank that has given up.
        group: whose ranks are compared.
        call: what the user has called, for messages.
        wait: for ranks that are not there yet.
        device: where the group's collectives may put what they send.
        facts: more that must be the same, by what it is called in messages.

    Raises:
        RuntimeError: on every rank that was there, if some were not.
        ValueError: on every rank, if ranks differ or one has an error; names rank, field and
            values.
    """
    fields = {} if config is None else {k: str(v) for k, v in vars(config).items()}
    mine = (_versions() | fields, list(tensors), dict(facts or {}))
    ranks = gather(mine, error, group, call=call, wait=wait, device=device)
    for what in _versions():
        equal(what, [rank[0].get(what, "unknown") for rank in ranks])
    for field in dataclasses.fields(Config):
        equal(f"Config.{field.name}", [rank[0][field.name] for rank in ranks])
    equal("the number of tensors", [str(len(rank[1])) for rank in ranks])
    for i, tensor in enumerate(mine[1]):
        for what, j in (("name", 0), ("shape", 1), ("dtype", 2), ("strides", 3)):
            equal(f"the {what} of tensor {i} ('{tensor[0]}')", [str(r[1][i][j]) for r in ranks])
    for what in dict.fromkeys(what for rank in ranks for what in rank[2]):
        equal(what, [rank[2].get(what, "none") for rank in ranks])


def gather(
    mine: T,
    error: Exception | None,
    group: dist.ProcessGroup,
    *,
    call: str,
    wait: timedelta,
    device: torch.device,
) -> list[T]:
    """What each rank of ``group`` brings, unless one brings an error: a collective.

    Args and errors are those of `agree`.
    """
    told = (None if error is None else f"{type(error).__name__}: {error}", mine)
    ranks: list[tuple[str | None, T]] = [told] * dist.get_world_size(group)
    _meet(group, call, wait, error)
    with current(device):
        dist.all_gather_object(ranks, told, group=group)
    if error is not None:
        raise error
    for rank, (theirs, _) in enumerate(ranks):
        if theirs is not None:
            raise ValueError(f"arc_topk: {call} failed on rank {rank}: {theirs}")
    return [rank[1] for rank in ranks]


def _versions() -> dict[str, str]:
    """Of what must be the same on every rank: another version may do another thing."""
    return {
        "the version of arc-topk": arc_topk.__version__,
        "the version of torch": torch.__version__,
    }


def _meet(group: dist.ProcessGroup, call: str, wait: timedelta, error: Exception | None) -> None:
    """`meet`; who has an error to tell of does not wait for long, and raises that."""
    try:
        meet(group, call, wait if error is None else min(wait, WAIT))
    except RuntimeError:
        if error is None:
            raise
        raise error from None


def equal(what: str, values: list[str]) -> None:
    """Raises ValueError, which lists them, where the ranks' values differ."""
    if len(set(values)) > 1:
        listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
        raise ValueError(
            f"arc_topk: {what} differs between ranks ({listed}); expected the same on every rank"
        )
