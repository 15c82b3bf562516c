"""Process groups of the engine's own threads."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore


def comm_group(
    group: dist.ProcessGroup, timeout: datetime.timedelta, token: str
) -> dist.ProcessGroup:
    """A Gloo group of the same ranks, which nobody but its holder knows. A collective.

    `torch.distributed.new_group` would keep it, its threads and its connections until the process
    group is destroyed; this one goes with the engine.

    Args:
        group: whose ranks and store it takes.
        timeout: of its collectives.
        token: the same on all ranks, and never used before with this group.
    """
    name = f"arc_topk/{token}"
    store = PrefixStore(name, group.get_group_store())
    rank, size = group.rank(), group.size()
    gloo = dist.ProcessGroup.BackendType.GLOO
    made = dist.ProcessGroup(store, rank, size)
    backend = dist.ProcessGroupGloo(PrefixStore("cpu", store), rank, size, timeout)
    for device in ("cpu", "cuda"):  # it stages what lies on a GPU through the host
        made._register_backend(torch.device(device), gloo, backend)
    made._set_default_backend(gloo)
    made._set_group_name(name)  # type: ignore[arg-type]
    made._set_group_desc("arc_topk")
    # All are connected to all before anybody goes on: a rank that let its engine go at once would
    # close connections that another is still making.
    made.barrier().wait()
    return made
