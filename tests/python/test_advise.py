"""advise(): what it measures, what it says, and that it leaves everything as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import DEVICE
from model import wrap
from ranks import Ranks, message_of
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import arc_topk
from arc_topk import advice as module

pytestmark = pytest.mark.device

LAYOUTS = [torch.empty(64, 48, device="meta"), torch.empty(48, device="meta")]
SLOW, FAST = [1e-3, 1e-6], [1e-9, 1e-15]  # seconds; seconds a byte


def advised(
    rank: int, world_size: int, link: list[float] | None, fields: dict[str, Any]
) -> tuple[arc_topk.Advice, str]:
    model = wrap(LAYOUTS, torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    measure = module._link
    if link is not None:
        module._link = lambda *_: link
    try:
        advice = arc_topk.advise(model, **fields)
    finally:
        module._link = measure
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, was) and parameter.grad is None
    arc_topk.register(model)  # it is free of any hook
    return advice, str(advice)


@pytest.mark.parametrize("compressor", ["arc_topk", "low_rank", "rand_k", "top_k"])
def test_all_ranks_get_one_advice(ranks: Ranks, compressor: str) -> None:
    results = ranks.run(advised, None, {"compressor": compressor, "ratio": 0.1})
    first, text = results[0]
    assert all(advice == first for advice, _ in results)
    assert first.ranks == len(results)
    assert first.numel == 64 * 48 + 48
    assert first.dense_bytes == 4 * first.numel > first.wire_bytes
    assert first.latency > 0 and first.compute > 0 and first.exposed is None
    assert first.compressed >= first.compute
    assert f"{len(results)} ranks, 0.0 M parameters" in text and "dense:" in text


def test_ratios_and_a_warm_up_are_the_models(ranks: Ranks) -> None:
    fields = {"ratio": 0.5, "ratios": {"tensors.*": 0.05}, "warmup_steps": 100}
    (small, _), *_ = ranks.run(advised, None, fields)
    (large, _), *_ = ranks.run(advised, None, {"ratio": 0.5})
    assert small.wire_bytes < large.wire_bytes


def test_a_slow_link_is_worth_it_and_a_fast_one_is_not(ranks: Ranks) -> None:
    for advice, text in ranks.run(advised, SLOW, {"ratio": 0.05}):
        assert advice.worth_it and advice.saves > 0
        assert (
            "sums 1 MB/s" in text
            and "Compression would save about" in text
            and "where backward does not hide it" in text
        )
        assert advice.dense == pytest.approx(1e-3 + advice.dense_bytes / 1e6)
    for advice, text in ranks.run(advised, FAST, {"ratio": 0.05}):
        assert not advice.worth_it
        assert "Leave compression off" in text


def test_gathering_costs_what_a_link_sends(pools: Any) -> None:
    (advice, _), *_ = pools.of(4).run(advised, [0.0, 1e-6], {"compressor": "top_k", "ratio": 0.1})
    # N - 1 times a rank's bytes, where an all-reduce sends 2 (N - 1) / N times them.
    assert advice.compressed - advice.compute == pytest.approx(2 * advice.wire_bytes / 1e6)


def test_times_are_told_as_people_write_them() -> None:
    assert [module._ms(s) for s in (2.384, 0.1, 0.0181, 5e-6)] == [
        "2,384 ms", "100 ms", "18.1 ms", "0.005 ms",
    ]  # fmt: skip


def run_with_step(rank: int, world_size: int) -> tuple[arc_topk.Advice, int, str]:
    linear = torch.nn.Linear(32, 32, device=DEVICE)
    model = DistributedDataParallel(linear)
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        model(torch.ones(4, 32, device=DEVICE)).sum().backward()

    advice = arc_topk.advise(model, step=step)
    assert linear.weight.grad is None
    return advice, calls, str(advice)


def test_a_step_tells_what_backward_hides(ranks: Ranks) -> None:
    for advice, calls, text in ranks.run(run_with_step):
        assert calls == 2 * (1 + module.REPEATS)
        assert advice.exposed is not None and advice.exposed >= 0
        assert "a step is" in text and "where backward" not in text


def run_on_one_rank(rank: int, world_size: int) -> list[str]:
    model, hooked = wrap(LAYOUTS, torch.float32), wrap(LAYOUTS, torch.float32)
    other = rank == 1
    texts = [
        message_of(lambda: arc_topk.advise(model, compressor="dense" if other else "arc_topk")),
        message_of(lambda: arc_topk.advise(model, ratio=2 if other else 0.1)),
        message_of(lambda: arc_topk.advise(model, step=None if other else int)),
    ]
    if other:
        hooked.register_comm_hook(None, allreduce_hook)
    return [*texts, message_of(lambda: arc_topk.advise(hooked))]


def test_what_one_rank_finds_wrong_is_an_error_on_every_rank(ranks: Ranks) -> None:
    for dense, ratio, step, hooked in ranks.run(run_on_one_rank):
        assert "compressor is 'dense', which saves nothing" in dense
        assert "ratio is 2" in ratio
        assert "step (given or not)" in step and "rank 1" in step
        assert "has a communication hook already" in hooked


def run_refusals(rank: int, world_size: int) -> list[str]:
    model = wrap(LAYOUTS, torch.float32)
    texts = [
        message_of(lambda: arc_topk.advise(model, compressor="dense")),
        message_of(lambda: arc_topk.advise(model, ratio=2)),
        message_of(lambda: arc_topk.advise(torch.nn.Linear(2, 2))),
        message_of(lambda: arc_topk.advise(model, ratio=0.1 * (1 + rank))),
    ]
    arc_topk.register(model)
    return [*texts, message_of(lambda: arc_topk.advise(model))]


def test_what_cannot_be_advised_on_is_refused_on_every_rank(ranks: Ranks) -> None:
    for dense, ratio, plain, differs, hooked in ranks.run(run_refusals):
        assert "compressor is 'dense', which saves nothing" in dense
        assert "ratio is 2" in ratio
        assert "no DDP instance in it" in plain
        assert "ratio" in differs and "rank 1" in differs
        assert "has a communication hook already" in hooked
