"""The process group that the engine's collectives run on."""

from __future__ import annotations

import contextlib
import datetime
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from arc_topk.comm_group import comm_group

# Backends whose collectives only queue themselves on the GPU's current stream, by how their names
# begin: torch 2.15 has "nccl2", "nccl-lazy", "nccl4py" and more behind what users call "nccl".
# torch tells of no backend whether it does.
QUEUEING = ("nccl",)
# Those that are known to make the host wait.
WAITING = ("gloo", "mpi", "ucc")

DEFAULT_TIMEOUT = datetime.timedelta(minutes=30)


def default_group() -> dist.ProcessGroup:
    """The default group, or RuntimeError."""
    if dist.group.WORLD is None:
        raise RuntimeError("arc_topk: no process group; call init_process_group() first")
    return dist.group.WORLD


def ambiguous(world: dist.ProcessGroup) -> ValueError | None:
    """The error for not being told a group, on a rank that is also in one of other ranks."""
    everyone = dist.get_process_group_ranks(world)
    for group, members in dist.distributed_c10d._world.pg_group_ranks.items():
        # torch keeps an entry for groups that this rank is not in, for ever.
        if group is not dist.GroupMember.NON_GROUP_MEMBER and sorted(members) != everyone:
            return ValueError(
                "arc_topk: the State is not bound, and there is more than one process group "
                f"(the default one and one of the ranks {', '.join(map(str, sorted(members)))}): "
                "whose gradients are averaged? Call state.bind(ddp), or make it with "
                "State(..., process_group=...)"
            )
    return None


@dataclass(frozen=True)
class Transport:
    """How the payloads of a device's buckets travel.

    Attributes:
        name: for people: ``"gloo"``, ``"nccl2"``, ``"gloo, staged through the host"``.
        queued: on the process group itself, by collectives that only queue themselves on the GPU's
            stream; else on Gloo groups of the engine's own threads.
        timeout: of the device's backend.
    """

    name: str
    queued: bool
    timeout: datetime.timedelta


def transport_of(group: dist.ProcessGroup, device: torch.device) -> Transport:
    """The transport for tensors on ``device``: by what the group's backend can do.

    A backend of another name than those that are known goes the safe way: its collectives may wait
    or not, so the engine's go over a Gloo group. A warning says so.
    """
    backend = _backend_of(group, device)
    staged = "gloo" if device.type == "cpu" else "gloo, staged through the host"
    if backend is None:
        return Transport(staged, False, timeout_of(group))
    name = str(backend.name()).lower()
    timeout = _timeout_of(backend)
    if device.type != "cpu" and name.startswith(QUEUEING):
        return Transport(name, True, timeout)
    if device.type != "cpu" and not name.startswith(WAITING):
        warnings.warn(
            f"arc_topk: the process group's backend for '{device.type}' is '{name}', of which it "
            "is not known whether its collectives only queue themselves on the current stream; "
            "the engine's go over Gloo instead, through the host: right, but slow. Expected NCCL "
            "or Gloo",
            stacklevel=2,
        )
    return Transport(staged, False, timeout)


def own_transport(group: dist.ProcessGroup, device: torch.device) -> Transport:
    """The transport of collectives on ``group`` itself, whatever its backend."""
    backend = _backend_of(group, device)
    if backend is None:
        return Transport("none", False, DEFAULT_TIMEOUT)
    name = str(backend.name()).lower()
    queued = device.type != "cpu" and name.startswith(QUEUEING)
    staged = device.type != "cpu" and name == "gloo"
    return Transport(
        f"{name}, staged through the host" if staged else name, queued, _timeout_of(backend)
    )


def _backend_of(group: dist.ProcessGroup, device: torch.device) -> Any:
    kind = torch.device(device.type)
    return group._get_backend(kind) if kind in group._device_types else None


def timeout_of(group: dist.ProcessGroup) -> datetime.timedelta:
    """The shortest of the group's backends; torch's default where none tells."""
    timeouts = [_timeout_of(group._get_backend(kind)) for kind in group._device_types]
    return min(timeouts, default=DEFAULT_TIMEOUT)


def _timeout_of(backend: Any) -> datetime.timedelta:
    try:
        timeout: datetime.timedelta = backend.options._timeout
    except (AttributeError, RuntimeError):  # backends of other makers need not have any
        return DEFAULT_TIMEOUT
    return timeout


COLLECTIVES = ("first", "second")  # of a bucket; those of all buckets go over a group of their own


def comm_groups_for(
    group: dist.ProcessGroup, transport: Transport, token: str
) -> list[dist.ProcessGroup]:
    """Groups of the same ranks and timeout, for the engine's collectives alone. A collective.

    None where collectives are queued: then there is nobody to wait for them, and the engine issues
    them on ``group`` itself, in the order of the buckets.
    """
    if transport.queued:
        return []
    return [comm_group(group, transport.timeout, f"{token}/{name}") for name in COLLECTIVES]


def current(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes a GPU the current one: torch's collectives of objects put theirs there."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return contextlib.nullcontext()
