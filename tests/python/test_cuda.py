"""The engine on a GPU, against the same steps on the CPU.

Both devices in one test, and what only a GPU has: streams, NCCL, launches. Where
ARC_TOPK_TEST_DEVICE does not ask for CUDA (`make gpu-check` does), all of it is skipped.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from model import Pick, random_gradients
from ranks import Pools
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import arc_topk

NOT_ASKED_FOR = "CUDA was not asked for: ARC_TOPK_TEST_DEVICE=cuda does (make gpu-check)"
pytestmark = [pytest.mark.device, pytest.mark.skipif(DEVICE == "cpu", reason=NOT_ASKED_FOR)]

COMPRESSORS = ("dense", "arc_topk", "rand_k", "top_k")
FEEDBACKS = ("none", "ef14", "ef21", "ef21m")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}
SHAPES = [(300, 70), (70,), (64, 64), (129, 33), (5, 3), (16, 8, 3, 3)]
STEPS = 5
# Launches a bucket. ARC-Top-K: scan, prepare, select, pack, apply; Rand-K packs in two goes. Where
# a tensor stays dense beside a shared estimate, its mean is looked at first.
LAUNCHES = {"arc_topk": 5, "rand_k": 6}


# --- on a rank ------------------------------------------------------------------------------------


@functools.cache
def group_of(backend: str) -> dist.ProcessGroup:
    """All ranks by a backend: made once in the life of a rank, for NCCL takes a second."""
    if backend == "nccl":
        # NCCL refuses two ranks on one GPU unless it takes them for two machines.
        os.environ["NCCL_HOSTID"] = f"rank{dist.get_rank()}"
    return dist.new_group(backend=backend)


def wrapped(device: str, backend: str, dtype: torch.dtype, **ddp: Any) -> DistributedDataParallel:
    """DDP of parameters of SHAPES, over all ranks."""
    model = Pick([torch.zeros(shape, dtype=dtype) for shape in SHAPES]).to(device)
    return DistributedDataParallel(model, process_group=group_of(backend), **ddp)


def run(
    rank: int,
    world_size: int,
    device: str,
    backend: str,
    dtype: torch.dtype,
    **fields: Any,
) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """STEPS averaged gradients of every parameter, on the CPU, and the metrics."""
    layouts = [torch.empty(shape) for shape in SHAPES]
    gradients = random_gradients(layouts, world_size, STEPS, dtype)
    model = wrapped(device, backend, dtype, bucket_cap_mb=0.05)
    state = arc_topk.register(model, **fields)
    results = []
    for step in range(STEPS):
        own = [None if g is None else g.to(device) for g in gradients[step][rank]]
        model.zero_grad(set_to_none=True)
        model(own).backward()
        results.append([p.grad.detach().cpu().clone() for p in model.module.tensors])
    return results, state.metrics()


def without_waiting(
    rank: int, world_size: int, backend: str, compressor: str, feedback: str
) -> dict[str, Any]:
    """Backward passes in which waiting for the GPU is an error; then what the profiler counts."""
    gradients = [torch.randn(shape, device="cuda") for shape in SHAPES]
    model = wrapped("cuda", backend, torch.float32)
    config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2}
    state = arc_topk.register(model, **config, wire_dtype=torch.float32)

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(gradients).backward()

    for _ in range(12):  # in its first ten DDP itself waits for the GPU, to time the passes
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    state.reset_metrics()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    events = profile.events()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [e for e in kernels if is_ours(e)]
    runtime = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    return {
        "ours": [e.name for e in ours],
        "exchanges": state.metrics()["exchanges"],
        "collectives": state.metrics()["collectives"],
        "waits": [n for n in runtime if n in ("cudaStreamSynchronize", "cudaEventSynchronize")],
    }


def is_ours(event: Any) -> bool:
    """Whether it is one of our kernels: the profiler shows our ranges among them, too."""
    return "arc_topk::cuda" in event.name and not event.is_user_annotation


def overlap(rank: int, world_size: int, backend: str) -> float:
    """Microseconds in which a kernel of ours runs while one of backward's does."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(2048, 2048, bias=False) for _ in range(12)]
    model = torch.nn.Sequential(*layers).cuda()
    ddp = DistributedDataParallel(model, process_group=group_of(backend), bucket_cap_mb=32)
    arc_topk.register(ddp, ratio=0.1)
    data = torch.randn(4096, 2048, device="cuda")
    for _ in range(4):
        ddp(data).sum().backward()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ddp(data).sum().backward()
        torch.cuda.synchronize()
    times = [
        (is_ours(e), any(word in e.name.lower() for word in ("gemm", "nvjet")), e.time_range)
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    ours = [(t.start, t.end) for own, _, t in times if own]
    gemms = [(t.start, t.end) for _, gemm, t in times if gemm]
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in ours for c, d in gemms)


# --- tests ----------------------------------------------------------------------------------------


def require_same(ours: list[list[Tensor]], theirs: list[list[Tensor]], dtype: torch.dtype) -> None:
    """Equal within rounding; where it chose another row, few elements differ."""
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for shape, x, y in zip(SHAPES, a, b, strict=True):
            x, y = x.double(), y.double()
            different = (x - y).abs() > TOLERANCE[dtype] * (1 + y.abs())
            share = float(different.double().mean())
            place = f"step {step}, shape {shape}"
            assert share <= 0.04, f"{place}: {share:.1%} of the elements differ from the CPU's"
            norms = float(x.norm()), float(y.norm())
            assert norms[0] == pytest.approx(norms[1], rel=0.03), f"{place}: norms {norms}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize(("world_size", "backend"), [(1, "nccl"), (2, "gloo")])
def test_as_on_the_cpu(
    pools: Pools,
    world_size: int,
    backend: str,
    compressor: str,
    feedback: str,
    dtype: torch.dtype,
) -> None:
    fields = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, "wire_dtype": dtype}
    ranks = pools.of(world_size)
    on_cpu = ranks.run(run, "cpu", "gloo", dtype, **fields)
    on_gpu = ranks.run(run, "cuda", backend, dtype, **fields)
    again = ranks.run(run, "cuda", backend, dtype, **fields)
    for rank in range(world_size):
        require_same(on_gpu[rank][0], on_cpu[rank][0], dtype)
        for name in ("exchanges", "collectives", "wire_bytes", "compressed_steps"):
            assert on_gpu[rank][1][name] == on_cpu[rank][1][name], name
        for step in range(STEPS):
            for first, second, rank0 in zip(
                on_gpu[rank][0][step], again[rank][0][step], on_gpu[0][0][step], strict=True
            ):
                assert torch.equal(first, second), "two runs differ"
                assert torch.equal(first, rank0), "ranks differ"


def test_two_nccl_ranks_on_one_gpu(pools: Pools) -> None:
    fields = {"compressor": "arc_topk", "feedback": "ef21m", "ratio": 0.2}
    ranks = pools.of(2)
    on_cpu = ranks.run(run, "cpu", "gloo", torch.float32, **fields)
    on_gpu = ranks.run(run, "cuda", "nccl", torch.float32, **fields)
    for rank in range(2):
        require_same(on_gpu[rank][0], on_cpu[rank][0], torch.float32)


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k"])
def test_nothing_waits_for_the_gpu(pools: Pools, compressor: str, feedback: str) -> None:
    seen = pools.of(1).run(without_waiting, "nccl", compressor, feedback)[0]
    # V is made once a step. One of SHAPES stays dense.
    launches = LAUNCHES[compressor] + (feedback in ("ef21", "ef21m"))
    expected = launches * seen["exchanges"] + (compressor == "arc_topk")
    assert len(seen["ours"]) == expected, seen["ours"]
    assert seen["collectives"] <= 2 * seen["exchanges"]
    # The synchronisation after the step, by this test itself, is cudaDeviceSynchronize.
    assert seen["waits"] == []


def test_overlaps_with_backward(pools: Pools) -> None:
    assert pools.of(1).run(overlap, "nccl")[0] > 0
