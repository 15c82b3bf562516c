"""What payloads travel over, by what the process group's backend can do."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import DEVICE
from model import wrap
from ranks import Ranks

import arc_topk
from arc_topk.groups import transport_of

pytestmark = pytest.mark.device

CUDA = torch.device("cuda", 0)
TIMEOUT = datetime.timedelta(seconds=77)


def group_with(**backends: str) -> Any:
    """A process group with a backend of a name for each type of device."""
    stubs = {
        torch.device(kind): SimpleNamespace(
            name=lambda name=name: name, options=SimpleNamespace(_timeout=TIMEOUT)
        )
        for kind, name in backends.items()
    }
    return SimpleNamespace(_device_types=list(stubs), _get_backend=stubs.__getitem__)


@pytest.mark.parametrize("name", ["nccl", "nccl2", "nccl-legacy", "nccl-lazy", "nccl4py", "NCCL"])
def test_every_nccl_queues_on_the_stream(name: str) -> None:
    transport = transport_of(group_with(cpu="gloo", cuda=name), CUDA)
    assert transport.queued and transport.name == name.lower() and transport.timeout == TIMEOUT


@pytest.mark.parametrize("name", ["gloo", "ucc", "mpi"])
def test_what_makes_the_host_wait_goes_over_gloo(
    name: str, recwarn: pytest.WarningsRecorder
) -> None:
    transport = transport_of(group_with(cuda=name), CUDA)
    assert not transport.queued and transport.name == "gloo, staged through the host"
    assert transport.timeout == TIMEOUT and not recwarn.list


def test_an_unknown_backend_goes_the_safe_way_and_is_named() -> None:
    with pytest.warns(UserWarning, match="'torchcomms'"):
        transport = transport_of(group_with(cuda="torchcomms"), CUDA)
    assert not transport.queued


def test_without_a_backend_for_the_device_it_is_staged() -> None:
    assert transport_of(group_with(cpu="gloo"), CUDA).name == "gloo, staged through the host"


def metrics_of(rank: int, world_size: int) -> str:
    state = arc_topk.register(wrap([torch.zeros(8, 8)], torch.float32))
    return str(state.metrics()["transport"])


def test_metrics_say_which(ranks: Ranks) -> None:
    expected = "gloo" if DEVICE == "cpu" else "gloo, staged through the host"
    assert ranks.run(metrics_of) == [expected] * 2
