"""The process group that the engine's collectives run on."""

from __future__ import annotations

import datetime
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from arc_topk.comm_group import comm_group

# Backends whose collectives only queue themselves on the GPU's current stream, by how their names
# begin: torch 2.15 has "nccl2", "nccl-lazy", "nccl4py" and more behind what users call "nccl".
# torch tells of no backend whether it does.
QUEUEING = ("nccl",)
# Those that are known to make the host wait.
WAITING = ("gloo", "mpi", "ucc")


@dataclass(frozen=True)
class Transport:
    """How the payloads of a device's buckets travel.

    Attributes:
        name: for people: ``"gloo"``, ``"nccl2"``, ``"gloo, staged through the host"``.
        queued: on the process group itself, by collectives that only queue themselves on the GPU's
            stream; else on a Gloo group of the engine's own thread.
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
    kind = torch.device(device.type)
    staged = "gloo" if device.type == "cpu" else "gloo, staged through the host"
    if kind not in group._device_types:
        return Transport(staged, False, datetime.timedelta(minutes=30))
    backend = group._get_backend(kind)
    name = str(backend.name()).lower()
    timeout: datetime.timedelta = backend.options._timeout
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


def comm_group_for(
    group: dist.ProcessGroup, transport: Transport, token: str
) -> dist.ProcessGroup | None:
    """A group of the same ranks and timeout, for the engine's collectives alone. A collective.

    None where collectives are queued: then there is nobody to wait for them, and the engine issues
    them on ``group`` itself, in the order of the buckets.
    """
    return None if transport.queued else comm_group(group, transport.timeout, token)
