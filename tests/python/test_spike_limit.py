"""Config.spike_limit: a gradient that is much longer than usual is scaled down on its own rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from device import DEVICE, copy_to
from model import Gradients, random_gradients, wrap
from ranks import Pools, Ranks
from test_engine import (
    COMPRESSORS,
    DTYPES,
    FEEDBACKS,
    FLOAT32,
    LAYOUTS,
    SELECTION,
    TOLERANCE,
    assert_same_bits,
    picks_of,
    run_native,
)
from torch import Tensor

import arc_topk
from arc_topk.reference import Oracle

pytestmark = pytest.mark.device

STEPS = 5
SPIKE = 2  # the step of it
LIMITED: dict[str, Any] = {"ratio": 0.2, "spike_limit": 1.5, **FLOAT32}


def gradients_with(
    spike: float, dtype: torch.dtype = torch.float32, world_size: int = 2, rank: int = 0
) -> Gradients:
    """Some gradients, those of one rank `spike` times as long in one step."""
    gradients = random_gradients(LAYOUTS, world_size, STEPS, dtype)
    gradients[SPIKE][rank] = [g * spike for g in gradients[SPIKE][rank] if g is not None]
    return gradients


def run_exchange(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any]
) -> list[list[Tensor]]:
    """One bucket, the same in all steps."""
    exchange = arc_topk.GradientExchange(copy_to(DEVICE, gradients[0][0]), **config)
    return [copy_to("cpu", exchange.all_reduce_(copy_to(DEVICE, g[rank]))) for g in gradients]


def assert_as_the_oracle(
    outputs: Sequence[Sequence[Sequence[Tensor | None]]],
    gradients: Gradients,
    config: dict[str, Any],
    forgets: Sequence[int] = (),
) -> Oracle:
    """`outputs[rank][step]` are the oracle's, whose running norms begin anew before `forgets`."""
    first = gradients[0][0][0]
    assert first is not None
    dtype = first.dtype
    oracle = Oracle(LAYOUTS, dtype, len(outputs), **config)
    before: list[Tensor | None] = [None] * len(LAYOUTS)
    for number, step in enumerate(gradients):
        for other in outputs[1:]:
            assert_same_bits(other[number], outputs[0][number])
        if number in forgets:
            oracle.limits = [type(limit)(limit.factor) for limit in oracle.limits]
        got = outputs[0][number]
        selected = picks_of(oracle, got, before)
        known = [[g for g in own if g is not None] for own in step]
        results = oracle.step(known, selected=selected, rtol=SELECTION[dtype])
        for t, (out, result) in enumerate(zip(got, results, strict=True)):
            assert out is not None
            torch.testing.assert_close(
                out.double(),
                result.output.double(),
                rtol=TOLERANCE[dtype],
                atol=TOLERANCE[dtype],
                equal_nan=True,
                msg=f"step {number}, tensor {t}",
            )
            before[t] = out
    return oracle


# --- the same as the oracle -----------------------------------------------------------------------


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_every_choice_agrees_with_the_oracle(pools: Pools, compressor: str, feedback: str) -> None:
    for world_size, dtype in ((1, torch.float32), (3, torch.float32), *((2, d) for d in DTYPES)):
        config = {
            "compressor": compressor,
            "feedback": feedback,
            "ratio": 0.2,
            "spike_limit": 1.5,
            **FLOAT32,
        }
        gradients = gradients_with(30, dtype, world_size)
        gradients[SPIKE + 1] = gradients[SPIKE]  # the first must not have raised the limit
        outputs = pools.of(world_size).run(run_exchange, gradients, config)
        oracle = assert_as_the_oracle(outputs, gradients, config)
        usual = torch.cat([g.double().flatten() for g in gradients[0][0] if g is not None])
        norm = float(usual.norm())
        assert oracle.limits[0].limit < 2 * norm  # it did cut the spike off


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("compressor", ["arc_topk", "dense"])
def test_under_ddp_it_agrees_with_the_oracle(ranks: Ranks, compressor: str, feedback: str) -> None:
    config = {
        "compressor": compressor,
        "feedback": feedback,
        "ratio": 0.2,
        "spike_limit": 1.5,
        **FLOAT32,
    }
    gradients = gradients_with(30)
    runs = ranks.run(run_native, LAYOUTS, gradients, torch.float32, config, {})
    # The buckets that DDP makes behind the first step begin without history.
    assert_as_the_oracle([run.outputs for run in runs], gradients, config, forgets=[1])


@pytest.mark.parametrize("compressor", ["arc_topk", "dense"])
def test_it_begins_with_start_step(ranks: Ranks, compressor: str) -> None:
    config = {
        "compressor": compressor,
        "feedback": "ef14",
        "start_step": SPIKE + 1,
        **LIMITED,
    }
    gradients = gradients_with(30)
    oracle = assert_as_the_oracle(ranks.run(run_exchange, gradients, config), gradients, config)
    assert oracle.limits[0].weight == pytest.approx(1 - 0.9**2)


# --- what it does ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_without_a_spike_nothing_changes(ranks: Ranks, compressor: str) -> None:
    for feedback in ("ef14", "ef21m"):
        config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2}
        without, within = (
            ranks.run(run_exchange, gradients_with(1), {**config, "spike_limit": limit})[0]
            for limit in (None, 2.0)
        )
        for a, b in zip(without, within, strict=True):
            assert_same_bits(a, b)


def test_a_spike_is_not_handed_out_later(ranks: Ranks) -> None:
    """EF14 hands out what it was given sooner or later, all of it: so it is not given the spike."""

    def longest(outputs: list[list[Tensor]]) -> float:
        return max(float(torch.cat([t.flatten() for t in step]).norm()) for step in outputs)

    config = {"feedback": "ef14", "ratio": 0.2}
    gradients = gradients_with(100)
    usual = longest(ranks.run(run_exchange, gradients_with(1), config)[0])
    spoilt = longest(ranks.run(run_exchange, gradients, config)[0][SPIKE + 1 :])
    mended = longest(ranks.run(run_exchange, gradients, {**config, "spike_limit": 2.0})[0])
    assert spoilt > 10 * usual and mended < 2 * usual


def accumulate(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any]
) -> list[list[Tensor | None]]:
    """Each step's gradient in two backward passes, a quarter of it under no_sync."""
    ddp = wrap(LAYOUTS, torch.float32)
    arc_topk.register(ddp, **config)
    outputs = []
    for step in gradients:
        parts = [[g * share for g in copy_to(DEVICE, step[rank])] for share in (0.25, 0.75)]
        ddp.zero_grad(set_to_none=True)
        with ddp.no_sync():
            ddp(parts[0]).backward()
        ddp(parts[1]).backward()
        outputs.append(copy_to("cpu", (p.grad for p in ddp.module.tensors)))
    return outputs


def test_accumulated_gradients_are_limited_as_one(ranks: Ranks) -> None:
    config = {"feedback": "ef14", **LIMITED}
    gradients = gradients_with(30)
    outputs = ranks.run(accumulate, gradients, config)
    assert_as_the_oracle(outputs, gradients, config, forgets=[1])


# --- gradients that are no usual ones -------------------------------------------------------------


def test_zeros_do_not_lower_the_limit(ranks: Ranks) -> None:
    config = {"feedback": "ef14", **LIMITED}
    gradients = gradients_with(1)
    for step in (1, 2):
        gradients[step][0] = [torch.zeros_like(g) for g in gradients[step][0] if g is not None]
    oracle = assert_as_the_oracle(ranks.run(run_exchange, gradients, config), gradients, config)
    assert oracle.limits[0].weight == pytest.approx(1 - 0.9**3)


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_does_not_count(ranks: Ranks, value: float, feedback: str) -> None:
    """It is NaN everywhere, as without a limit; a spike behind it is limited as before."""
    config = {"feedback": feedback, **LIMITED}
    gradients = gradients_with(1)
    spoilt = gradients[SPIKE][0][0]
    assert spoilt is not None
    spoilt[3, 4] = value
    gradients[SPIKE + 1][0] = [30 * g for g in gradients[SPIKE + 1][0] if g is not None]
    runs = ranks.run(run_native, LAYOUTS, gradients, torch.float32, config, {})
    outputs = [run.outputs for run in runs]
    oracle = assert_as_the_oracle(outputs, gradients, config, forgets=[1])
    spoilt, later = outputs[0][SPIKE][0], outputs[0][SPIKE + 1][0]
    assert spoilt is not None and spoilt.isnan().all()
    assert later is not None and later.isfinite().all()
    assert math.isfinite(oracle.limits[0].limit)


def test_a_spike_whose_norm_overflows_is_dropped(ranks: Ranks) -> None:
    config = {"feedback": "ef14", **LIMITED}
    gradients = gradients_with(1e30)
    outputs = ranks.run(run_exchange, gradients, config)
    assert_as_the_oracle(outputs, gradients, config)
    assert max(float(t.abs().max()) for step in outputs[0] for t in step) < 100
