"""The process group that the engine's collectives run on."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist


def lane_group(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup | None:
    """A Gloo group of the same ranks and timeout, for the engine's collectives alone.

    None where collectives only queue themselves on the GPU's stream (NCCL): then there is nobody
    to wait for them, and the engine issues them on ``group`` itself, in the order of the buckets.
    """
    kind = torch.device(device.type)
    timeout: datetime.timedelta | None = None
    if kind in group._device_types:
        backend = group._get_backend(kind)
        if backend.name() == "nccl":
            return None
        timeout = backend.options._timeout
    lane = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=timeout,
        backend="gloo",
        use_local_synchronization=True,
        group_desc="arc_topk",
    )
    assert isinstance(lane, dist.ProcessGroup)
    return lane
