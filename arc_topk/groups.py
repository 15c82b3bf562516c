"""The process group that the engine's collectives run on."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

from arc_topk.comm_group import comm_group


def comm_group_for(
    group: dist.ProcessGroup, device: torch.device, token: str
) -> dist.ProcessGroup | None:
    """A group of the same ranks and timeout, for the engine's collectives alone. A collective.

    None where collectives only queue themselves on the GPU's stream (NCCL): then there is nobody
    to wait for them, and the engine issues them on ``group`` itself, in the order of the buckets.
    """
    kind = torch.device(device.type)
    timeout = datetime.timedelta(minutes=30)
    if kind in group._device_types:
        backend = group._get_backend(kind)
        if backend.name() == "nccl":
            return None
        timeout = backend.options._timeout
    return comm_group(group, timeout, token)
