"""Faults: a clear error on every rank, and no rank that hangs."""

from __future__ import annotations

import functools
import os
import resource
import signal
from datetime import timedelta
from typing import Any

import pytest
import torch
from device import DEVICE
from model import Gradients, backward, random_gradients, wrap
from ranks import Pools, Ranks, message_of, temporary
from test_engine import LAYOUTS

import arc_topk

pytestmark = pytest.mark.device

# How long a rank waits for one that is lost: generous for a busy machine.
# On CUDA it also waits for one that is still making its context, which takes seconds.
SHORT = timedelta(seconds=10)


# --- ranks that differ
# ------------------------------------------------------------------------------


def register_with(rank: int, world_size: int, by_rank: list[dict[str, Any]]) -> str:
    model = wrap(LAYOUTS, torch.float32)
    return message_of(lambda: arc_topk.register(model, **by_rank[rank]))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("compressor", ("arc_topk", "rand_k", "arc_topk")),
        ("feedback", ("ef14", "ef14", "none")),
        ("ratio", (0.1, 0.2, 0.1)),
        ("sketch_dim", (4, 8, 4)),
        ("row_width", (None, 8, None)),
        ("start_step", (0, 0, 1)),
        ("wire_dtype", (None, torch.bfloat16, None)),
        ("sketch_dtype", (None, None, torch.bfloat16)),
        ("state_dtype", (torch.bfloat16, None, None)),
        ("seed", (1, 2, 3)),
        ("spike_limit", (None, 3.0, None)),
        ("check_every", (0, 5, 0)),
        ("resync_every", (None, None, 3)),
    ],
)
def test_configurations_that_differ(pools: Pools, field: str, values: tuple[Any, ...]) -> None:
    texts = pools.of(3).run(register_with, [{field: value} for value in values])
    for text in texts:
        assert text.startswith("ValueError") and f"Config.{field}" in text
        for rank, value in enumerate(values):
            assert f"rank {rank}: {value}" in text


def test_momenta_that_differ(pools: Pools) -> None:
    by_rank = [{"feedback": "ef21m", "eta": eta} for eta in (0.1, 0.1, 0.2)]
    for text in pools.of(3).run(register_with, by_rank):
        assert "Config.eta differs between ranks (rank 0: 0.1, rank 1: 0.1, rank 2: 0.2)" in text


def register_as(rank: int, world_size: int, module: str, name: str, on_one: str) -> str:
    import importlib

    where = importlib.import_module(module)
    true = getattr(where, name)
    if rank == 1:
        setattr(where, name, on_one)
    try:
        return register_with(rank, world_size, [{}] * world_size)
    finally:
        setattr(where, name, true)


@pytest.mark.parametrize(("module", "what"), [("arc_topk", "arc-topk"), ("torch", "torch")])
def test_versions_that_differ(pools: Pools, module: str, what: str) -> None:
    for text in pools.of(3).run(register_as, module, "__version__", "0.0.7"):
        assert f"the version of {what} differs between ranks" in text and "rank 1: 0.0.7" in text


def test_a_wrong_value_on_one_rank_is_an_error_on_all(pools: Pools) -> None:
    texts = pools.of(3).run(register_with, [{}, {"ratio": 7}, {}])
    assert texts[1] == "ValueError: ratio is 7; expected a number in (0, 1]"
    for text in (texts[0], texts[2]):
        assert "rank 1" in text and "ratio is 7" in text


def bind_differing(rank: int, world_size: int) -> str:
    """The standard form without bind(): compared at the first bucket."""
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.State(seed=rank)
    model.register_comm_hook(state, arc_topk.arc_topk_hook)
    gradients = random_gradients(LAYOUTS, world_size, 1, torch.float32)
    return message_of(lambda: backward(model, gradients[0][rank]))


def test_an_unbound_state_compares_at_its_first_bucket(pools: Pools) -> None:
    with temporary(2, timedelta(seconds=20)) as pool:
        for text in pool.run(bind_differing):
            assert "Config.seed" in text and "rank 0: 0, rank 1: 1" in text


def exchange_with(rank: int, world_size: int, shapes: list[tuple[int, ...]]) -> str:
    tensors = [torch.zeros(shape, device=DEVICE) for shape in ((3, 3), shapes[rank])]
    return message_of(lambda: arc_topk.GradientExchange(tensors))


def test_tensors_that_differ(ranks: Ranks) -> None:
    for text in ranks.run(exchange_with, [(4, 2), (4, 3)]):
        assert "shape of tensor 1" in text and "(4, 2)" in text and "(4, 3)" in text


def exchange_of(rank: int, world_size: int, by_rank: list[list[torch.Tensor]]) -> str:
    tensors = [t.to(DEVICE) for t in by_rank[rank]]
    return message_of(lambda: arc_topk.GradientExchange(tensors))


A, B = torch.zeros(4, 2), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        ([A], ("the number of tensors", "rank 0: 2, rank 1: 1")),
        ([B, A], ("the shape of tensor 0", "rank 0: (4, 2), rank 1: (2, 4)")),
        ([A, B.double()], ("the dtype of tensor 1", "torch.float32", "torch.float64")),
        ([A, A.t()], ("the strides of tensor 1", "rank 0: (4, 1), rank 1: (1, 2)")),
    ],
)
def test_lists_that_differ(ranks: Ranks, one: list[torch.Tensor], words: tuple[str, ...]) -> None:
    for text in ranks.run(exchange_of, [[A, B], one]):
        assert text.startswith("ValueError")
        for word in words:
            assert word in text, text


class Named(torch.nn.Module):
    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, torch.nn.Parameter(torch.zeros(4, 4, device=DEVICE)))


def register_named(rank: int, world_size: int, by_rank: list[str]) -> str:
    model = torch.nn.parallel.DistributedDataParallel(Named(by_rank[rank]))
    return message_of(lambda: arc_topk.register(model))


def test_parameters_in_another_order(ranks: Ranks) -> None:
    for text in ranks.run(register_named, ["ab", "ba"]):
        assert "the name of tensor 0" in text and "rank 0: a, rank 1: b" in text


def exchange_on_another_device(rank: int, world_size: int) -> str:
    device = "meta" if rank == 1 else DEVICE
    return message_of(lambda: arc_topk.GradientExchange([torch.zeros(3, device=device)]))


def test_tensors_on_another_device(ranks: Ranks) -> None:
    zero, one = ranks.run(exchange_on_another_device)
    assert one.startswith("ValueError: tensors[0] is on device 'meta'; expected 'cpu'")
    assert "rank 1" in zero and "device 'meta'" in zero


def exchange_wrong_tensors(rank: int, world_size: int) -> list[str]:
    zeros = functools.partial(torch.zeros, device=DEVICE)
    exchange = arc_topk.GradientExchange([zeros(3, 3), zeros(4)])
    wrong: list[list[torch.Tensor]] = [
        [zeros(3, 3)],
        [zeros(3, 3), zeros(5)],
        [zeros(3, 3, dtype=torch.float64), zeros(4)],
    ]
    return [message_of(lambda t=t: exchange.all_reduce_(t)) for t in wrong]


def test_tensors_other_than_at_the_start(ranks: Ranks) -> None:
    for count, shape, dtype in ranks.run(exchange_wrong_tensors):
        assert "1 tensors; expected 2" in count
        assert "tensors[1]" in shape and "(5,)" in shape and "(4,)" in shape
        assert "tensors[0]" in dtype and "float64" in dtype and "float32" in dtype


# --- ranks that go
# ------------------------------------------------------------------------------------


def lose_a_rank(rank: int, world_size: int, gradients: Gradients, how: str) -> list[str]:
    model = wrap(LAYOUTS, torch.float32, bucket_cap_mb=0.004)
    arc_topk.register(model, ratio=0.2)
    for step in gradients[:2]:
        backward(model, step[rank])
    if rank == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "absent":
        return []
    return [message_of(lambda: backward(model, gradients[2][rank]))]


@pytest.mark.parametrize("how", ["killed", "absent"])
def test_a_lost_rank_is_an_error_that_names_its_place(how: str) -> None:
    gradients = random_gradients(LAYOUTS, 2, 3, torch.float32)
    with temporary(2, SHORT) as pool:
        pool.start(lose_a_rank, gradients, how)
        ok, texts = pool.result(0)
    assert ok, texts
    for words in ("rank 0", "bucket 0", "first parameter 'tensors.", "phase first_collective"):
        assert words in texts[0], texts[0]


# --- memory that cannot be had
# ------------------------------------------------------------------------------------


def run_out_of_memory(rank: int, world_size: int) -> str:
    """Rank 1 may take half of what its first bucket's state and payloads need."""
    numel = 8 * 2**20
    tensors = [torch.zeros(numel // 1024, 1024)]
    exchange = arc_topk.GradientExchange(tensors, feedback="ef21m")
    if rank == 1:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + numel * 6, most))
    return message_of(lambda: exchange.all_reduce_(tensors))


@pytest.mark.skipif(DEVICE != "cpu", reason="the limit is the host's memory's")
def test_memory_that_one_rank_cannot_have() -> None:
    with temporary(2, SHORT) as pool:
        zero, one = pool.run(run_out_of_memory)
    assert "alloc" in one, one
    for words in ("rank 0", "bucket 0", "'tensor 0'", "phase first_collective"):
        assert words in zero, zero
