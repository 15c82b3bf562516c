"""Whatever a model's parameters are, and whoever averages them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from oracle_hook import Observed, check, gradients_of, noise
from ranks import Pools, Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

pytestmark = pytest.mark.device

STEPS = 4
SMALL = {"bucket_cap_mb": 0.001}


# --- layouts and types ----------------------------------------------------------------------------


class Held(nn.Module):
    """Parameters as they lie. Its loss is sum(p * g): the gradient of p is g, whatever that is."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(t) for t in tensors)

    def forward(self, seed: int) -> Tensor:
        parts = [
            (p * noise(seed + i, *p.shape).to(p.dtype)).sum().double()
            for i, p in enumerate(self.tensors)
        ]
        return torch.stack(parts).sum()


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def layouts(kind: str) -> list[Tensor]:
    wide = zeros(16, 24)
    f64, bf16, f16 = torch.float64, torch.bfloat16, torch.float16
    return {
        "memory formats": [
            zeros(8, 6, 3, 3).to(memory_format=torch.channels_last),
            zeros(6, 4, 2, 3, 3).to(memory_format=torch.channels_last_3d),
            zeros(8, 6, 3, 3),
        ],
        "transposed": [zeros(12, 20).t(), zeros(4, 10, 6).permute(2, 0, 1), zeros(9)],
        "with gaps": [wide[:, ::2], wide[3:9, 4:15], zeros(40)[::3], zeros(20, 10)],
        "mixed types": [
            zeros(20, 12),
            zeros(20, 12, dtype=f64),
            zeros(24, 32, dtype=bf16),
            zeros(24, 32, dtype=f16),
            zeros(7, dtype=f64),
            zeros(9),
        ],
        "scalars": [zeros(), zeros(20, 12), zeros(1), zeros(1, 1)],
        "empty ones": [zeros(0), zeros(20, 12), zeros(0, 12), zeros(5, 0, 3), zeros(6)],
        "scalars alone": [zeros(), zeros()],
        "empty ones alone": [zeros(0), zeros(0, 12)],
        "empty halves alone": [zeros(0, dtype=f16), zeros(0, 12, dtype=f16)],
    }[kind]


LAYOUTS = [
    "memory formats",
    "transposed",
    "with gaps",
    "mixed types",
    "scalars",
    "empty ones",
    "scalars alone",
    "empty ones alone",
]


def hold(wrap: Any, rank: int, world_size: int, kind: str, options: dict[str, Any]) -> Observed:
    module = Held(layouts(kind))
    ddp = wrap(module, **SMALL, **options)
    seen: Observed = []
    for step in range(STEPS):
        ddp.zero_grad()
        ddp(100 * step + 50 * rank).backward()
        seen += gradients_of(module)
    return seen


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_parameters_however_they_lie(ranks: Ranks, kind: str, view: bool) -> None:
    check(ranks, hold, kind, {"gradient_as_bucket_view": view})


@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "dense"])
def test_empty_ones_alone_in_a_payload(ranks: Ranks, compressor: str) -> None:
    """float16 over a bfloat16 wire is not averaged in place: a payload, and no element in it."""
    config = {"compressor": compressor, "feedback": "none", "wire_dtype": torch.bfloat16}
    check(ranks, hold, "empty halves alone", {}, settings=[config])


# --- which of them, and how often -----------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose weight is the output's, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 12)
        self.output = nn.Linear(12, 20, bias=False)
        self.output.weight = self.embedding.weight
        # Behind both names of the one weight: who counted it twice would move this one's place.
        self.twice = nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        out: Tensor = self.output(self.twice(self.twice(x).tanh()))
        return out


def tie(wrap: Any, rank: int, world_size: int, options: dict[str, Any]) -> Observed:
    module = Tied().to(DEVICE)
    ddp = wrap(module, **SMALL, **options)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    seen: Observed = []
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens = torch.arange(9, device=DEVICE) * (step + 1 + 2 * rank) % 20
        nn.functional.cross_entropy(ddp(tokens), tokens.roll(1)).backward()
        seen += gradients_of(module)
        optimizer.step()
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str
)
def test_tied_weights_and_a_layer_used_twice(ranks: Ranks, options: dict[str, Any]) -> None:
    check(ranks, tie, options)


def two_forwards(wrap: Any, rank: int, world_size: int) -> Observed:
    """The whole DDP twice in one graph, the second time under no_sync as plain DDP wants it."""
    module = nn.Linear(10, 16).to(DEVICE)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(noise(7, *p.shape))
    ddp = wrap(module, **SMALL)
    seen: Observed = []
    for step in range(STEPS):
        ddp.zero_grad()
        with ddp.no_sync():
            first = ddp(noise(10 * step + rank, 3, 10))
        second = ddp(noise(10 * step + 5 + rank, 3, 10))
        (first.square().mean() + second.square().mean()).backward()
        seen += gradients_of(module)
    return seen


def test_two_forwards_before_one_backward(ranks: Ranks) -> None:
    check(ranks, two_forwards)


def freeze(wrap: Any, rank: int, world_size: int) -> Observed:
    """The first layer is frozen from the start, the second for two steps on the way."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 12), nn.Linear(12, 9)).to(DEVICE)
    module[0].requires_grad_(False)
    ddp = wrap(module, find_unused_parameters=True, **SMALL)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    seen: Observed = []
    for step in range(7):
        module[1].requires_grad_(step not in (3, 4))
        optimizer.zero_grad()
        ddp(noise(10 * step + rank, 5, 10)).square().mean().backward()
        seen += gradients_of(module)
        optimizer.step()
    return seen


def test_frozen_from_the_start_and_frozen_later(ranks: Ranks) -> None:
    for trials in check(ranks, freeze):
        for trial in trials:
            assert all(t is None for t in trial.got[0::6]), "frozen from the start"
            assert [t is None for t in trial.got[2::6]] == [i in (3, 4) for i in range(7)]


def two_in_one_loss(wrap: Any, rank: int, world_size: int) -> Observed:
    """Buckets of both come in one backward pass, one among the other's."""
    torch.manual_seed(0)
    modules = [
        nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 10)).to(DEVICE) for _ in range(2)
    ]
    first, second = (wrap(module, **SMALL) for module in modules)
    seen: Observed = []
    for step in range(STEPS):
        for ddp in (first, second):
            ddp.zero_grad()
        x = noise(10 * step + rank, 5, 10)
        (second(first(x)) - first.module(x)).square().mean().backward()
        seen += [g for module in modules for g in gradients_of(module)]
    return seen


def test_two_ddps_in_one_backward(ranks: Ranks) -> None:
    check(ranks, two_in_one_loss)


# --- whose ranks ----------------------------------------------------------------------------------


def linear(wrap: Any, rank: int, **options: Any) -> Observed:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 9)).to(DEVICE)
    ddp = wrap(module, **SMALL, **options)
    seen: Observed = []
    for step in range(STEPS):
        ddp.zero_grad()
        ddp(noise(10 * step + rank, 5, 10)).square().mean().backward()
        seen += gradients_of(module)
    return seen


def in_a_part_of_the_world(wrap: Any, rank: int, world_size: int) -> Observed:
    """Ranks 0 and 2, given in the other order; rank 1 averages with itself."""
    pair, alone = dist.new_group([2, 0]), dist.new_group([1])
    seen = linear(wrap, rank, process_group=alone if rank == 1 else pair)
    dist.barrier()
    dist.destroy_process_group(alone if rank == 1 else pair)
    return seen


def test_process_groups_that_are_not_the_world(pools: Pools) -> None:
    check(pools.of(3), in_a_part_of_the_world, alike=False)


@functools.cache  # its groups stay as long as the rank, and each has threads that wake up often
def mesh_of(dimension: str | None) -> DeviceMesh:
    if dimension is None:
        return DeviceMesh(DEVICE, [0, 1, 2, 3])
    square = DeviceMesh(DEVICE, [[0, 1], [2, 3]], mesh_dim_names=("data", "other"))
    return square[dimension]


def in_a_mesh(wrap: Any, rank: int, world_size: int, dimension: str | None) -> Observed:
    return linear(wrap, rank, device_mesh=mesh_of(dimension))


@pytest.mark.parametrize("dimension", [None, "data", "other"])
def test_device_meshes(pools: Pools, dimension: str | None) -> None:
    check(pools.of(4), in_a_mesh, dimension, alike=dimension is None)


def in_the_world(wrap: Any, rank: int, world_size: int) -> Observed:
    return linear(wrap, rank)


def test_a_world_of_one_rank(pools: Pools) -> None:
    check(pools.of(1), in_the_world)
