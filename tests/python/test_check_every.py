"""Ranks that have come apart say so (check_every); the shared estimate is resynced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import DEVICE
from model import Gradients, backward, random_gradients, wrap
from ranks import Pools, Ranks, message_of
from test_engine import assert_same_bits, check_against_oracle, run_native

import arc_topk

pytestmark = pytest.mark.device

LAYOUTS = [
    torch.empty(40, 24, device="meta"),
    torch.empty(7, device="meta"),
    torch.empty(33, 70, device="meta"),
]
EVERY = 3


def hold_another_estimate(rank: int, world_size: int, feedback: str) -> list[str]:
    """Rank 1's h is damaged behind step 4; the errors of steps 5 to 7."""
    gradient = torch.randn(20, 8, generator=torch.Generator().manual_seed(rank)).to(DEVICE)
    exchange = arc_topk.GradientExchange(
        [gradient], feedback=feedback, ratio=0.2, check_every=EVERY
    )
    bucket = exchange._buckets[0]
    for _ in range(4):
        bucket.load([gradient])
        h = exchange._engine.run(bucket.buffer, bucket.keys)
    if rank == 1:
        assert h is not bucket.buffer
        h[3] += 1e-3
    return [message_of(lambda: exchange.all_reduce_([gradient.clone()])) for _ in range(3)]


@pytest.mark.parametrize("feedback", ["ef21", "ef21m"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_another_estimate_is_found_on_every_rank(
    pools: Pools, world_size: int, feedback: str
) -> None:
    for rank, texts in enumerate(pools.of(world_size).run(hold_another_estimate, feedback)):
        assert texts[0] == ""  # step 5
        for words in (f"rank {rank}, bucket 0", "'tensor 0'", "phase check", "in step 6"):
            assert words in texts[1], texts[1]
        assert "the averaged gradients of rank 0 differ from those of rank 1;" in texts[1]
        assert "nothing is exchanged after this failure" in texts[2]


def checked_run(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any]
) -> tuple[list[Any], int, int]:
    model = wrap(LAYOUTS, torch.float32)
    state = arc_topk.register(model, **config)
    outputs = [backward(model, step[rank]) for step in gradients]
    metrics = state.metrics()
    return outputs, metrics["collectives"], metrics["wire_bytes"]


@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "top_k"])
def test_a_check_changes_nothing_and_costs_16_bytes(ranks: Ranks, compressor: str) -> None:
    gradients = random_gradients(LAYOUTS, 2, 2 * EVERY, torch.float32)
    for feedback in ("none", "ef14", "ef21", "ef21m"):
        config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2}
        without = ranks.run(checked_run, gradients, config)
        checked = ranks.run(checked_run, gradients, {**config, "check_every": EVERY})
        for (a, collectives, wire), (b, more, bytes_more) in zip(without, checked, strict=True):
            for x, y in zip(a, b, strict=True):
                assert_same_bits(x, y)
            assert (more - collectives, bytes_more - wire) == (2, 32)


# --- denormal numbers
# --------------------------------------------------------------------------------


def flush_on_one(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any], flushing: list[int]
) -> list[Any]:
    torch.set_flush_denormal(rank in flushing)
    try:
        model = wrap(LAYOUTS, torch.float32)
        arc_topk.register(model, **config)
        return [backward(model, step[rank]) for step in gradients]
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("scale", [1e-22, 1e-36])  # squares of sketches, or all there is
@pytest.mark.parametrize("feedback", ["none", "ef14", "ef21", "ef21m"])
@pytest.mark.parametrize(
    ("compressor", "wire"),
    [("arc_topk", None), ("arc_topk", torch.uint8), ("rand_k", None), ("top_k", None)],
)
def test_ranks_that_flush_denormal_numbers_get_the_same_bits(
    ranks: Ranks, compressor: str, wire: torch.dtype | None, feedback: str, scale: float
) -> None:
    gradients = random_gradients(LAYOUTS, 2, 4, torch.float32)
    for step in gradients:
        for own in step:
            for g in own:
                assert g is not None
                g.mul_(scale)
    config = {
        "compressor": compressor,
        "feedback": feedback,
        "ratio": 0.2,
        "check_every": 1,
        "wire_dtype": wire,
    }
    outputs = ranks.run(flush_on_one, gradients, config, [1])
    for a, b in zip(*outputs, strict=True):
        assert_same_bits(a, b)


# --- the estimate and the mean of the ranks' own
# --------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("feedback", ["ef21", "ef21m"])
@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k"])
def test_a_resync_agrees_with_the_oracle(
    pools: Pools, compressor: str, feedback: str, wire: torch.dtype, world_size: int
) -> None:
    config = {
        "compressor": compressor,
        "feedback": feedback,
        "ratio": 0.2,
        "wire_dtype": wire,
        "resync_every": 2,
    }
    gradients = random_gradients(LAYOUTS, world_size, 5, torch.float32)
    runs = pools.of(world_size).run(run_native, LAYOUTS, gradients, torch.float32, config, {})
    # No picks can be read off h in a resync's step, where all of it changes: the oracle's must do.
    if wire == torch.float32:
        check_against_oracle(runs, LAYOUTS, gradients, torch.float32, config)
    without = {**config, "resync_every": 0}
    plain = pools.of(world_size).run(run_native, LAYOUTS, gradients, torch.float32, without, {})
    matrices = 4 * (40 * 24 + 33 * 70)
    for mended, never in zip(runs, plain, strict=True):
        assert mended.metrics["wire_bytes"] - never.metrics["wire_bytes"] == 2 * matrices
        assert_same_bits(mended.outputs[-1], runs[0].outputs[-1])


@pytest.mark.parametrize(
    ("fields", "every"),
    [
        ({"wire_dtype": torch.bfloat16}, 32),
        ({"wire_dtype": torch.float16}, 2048),
        ({"wire_dtype": torch.uint8}, 2048),
        ({"wire_dtype": None}, 512),
        ({"wire_dtype": torch.bfloat16, "resync_every": 0}, 0),
        ({"wire_dtype": None, "resync_every": 7}, 7),
        ({"wire_dtype": torch.bfloat16, "compressor": "top_k"}, 0),
        ({"wire_dtype": torch.bfloat16, "feedback": "ef14"}, 0),
    ],
)
def test_the_plan_says_what_resyncs_cost(fields: dict[str, Any], every: int) -> None:
    config = arc_topk.Config(**{"feedback": "ef21m", "ratio": 0.2, **fields})
    named = [("a", torch.empty(100, 32, device="meta")), ("b", torch.empty(9, device="meta"))]
    plan = arc_topk.plan.make_plan(config, named, 2)
    assert [row.resync_every for row in plan.rows] == [every, 0]
    assert [row.resync_bytes for row in plan.rows] == [12800 if every else 0, 0]
    assert plan.resync_bytes == (12800 / every if every else 0)
    assert (f"every {every} steps 12,800 bytes more" in str(plan)) == (every > 0)
    assert arc_topk.plan.make_plan(config, named, 1).resync_bytes == 0
