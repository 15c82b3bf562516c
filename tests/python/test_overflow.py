"""Finite gradients whose sum over ranks is not: nothing may stay infinite, nor be lost."""

from __future__ import annotations

import pytest
import torch
from model import random_gradients
from ranks import Pools
from test_engine import COMPRESSED, FEEDBACKS, LAYOUTS, assert_same_bits, run_native

pytestmark = pytest.mark.device

HUGE = 3e38  # of float32 and bfloat16 the largest is 3.4e38
LARGEST = {torch.float64: 1.5e308, torch.float32: HUGE, torch.bfloat16: HUGE, torch.float16: 6e4}
MATRIX, VECTOR, ROW, STEP = 0, 1, 7, 2
COMPRESSORS = ["arc_topk", "rand_k", "top_k"]


@pytest.mark.parametrize(
    ("compressor", "feedback", "wire"),
    [
        *((*pair, wire) for pair in COMPRESSED for wire in (torch.float32, torch.bfloat16)),
        *(("arc_topk", feedback, torch.uint8) for feedback in FEEDBACKS),
        ("low_rank", "ef14", torch.uint8),
    ],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_finite_mean_whose_sum_overflows(
    pools: Pools, world_size: int, compressor: str, feedback: str, wire: torch.dtype | None
) -> None:
    gradients = random_gradients(LAYOUTS, world_size, 40, torch.float32)
    for own in gradients[STEP]:
        assert own[MATRIX] is not None
        own[MATRIX][ROW] = HUGE
    config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, "wire_dtype": wire}
    runs = pools.of(world_size).run(run_native, LAYOUTS, gradients, torch.float32, config, {})
    for step in zip(*(run.outputs for run in runs), strict=True):
        for other in step[1:]:
            assert_same_bits(step[0], other)
    outputs = [step[MATRIX] for step in runs[0].outputs]
    assert all(out is not None and out.isfinite().all() for out in outputs)
    if compressor == "arc_topk" and feedback != "ef21m":
        half_a_unit = 5e-2 if wire == torch.uint8 else 0.0
        rtol = 1e-2 + half_a_unit
        torch.testing.assert_close(outputs[STEP][ROW], torch.full((24,), HUGE), rtol=rtol, atol=0)
    if compressor == "top_k" and feedback != "ef21m":  # takes some of the row's elements
        sent = outputs[STEP][ROW] > HUGE / 2
        assert sent.any() and torch.all((outputs[STEP][ROW][sent] / HUGE - 1).abs() < 1e-2)
    if feedback in ("none", "ef14"):  # what was owed has been paid, and all goes on as before
        assert outputs[-1].abs().max() < 1e3
    # On an uint8 wire what is left of the row comes in a few more steps, of which the largest has
    # all of the energy: that is one row's against its score, and says nothing.
    if compressor == "arc_topk" and wire != torch.uint8:
        assert 0 < runs[0].metrics["energy_captured"] < 2


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("feedback", ["ef14", "ef21m"])
def test_dense_tensors_between_compressed_ones(
    pools: Pools, feedback: str, compressor: str, dtype: torch.dtype
) -> None:
    """They travel in either payload, by their dtype, and are averaged there as they are."""
    huge = LARGEST[dtype]
    gradients = random_gradients(LAYOUTS, 3, 4, dtype)
    for own in gradients[STEP]:
        assert own[VECTOR] is not None
        own[VECTOR][:] = huge
    config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, "eta": None}
    runs = pools.of(3).run(run_native, LAYOUTS, gradients, dtype, config, {})
    for run in runs:
        out = run.outputs[STEP][VECTOR]
        assert out is not None and out.isfinite().all()
        expected = huge * 0.1 if feedback == "ef21m" else huge
        torch.testing.assert_close(
            out.double(), torch.full((7,), expected, dtype=torch.float64), rtol=2e-2, atol=0
        )


def test_a_message_that_overflows_is_not_finite_and_changes_no_state(pools: Pools) -> None:
    """EF21 sends g - h: from -HUGE to HUGE that is no float32, though both gradients are."""
    gradients = random_gradients(LAYOUTS, 2, 5, torch.float32)
    for step, value in ((0, -HUGE), (1, -HUGE), (STEP, HUGE), (3, -HUGE), (4, -HUGE)):
        for own in gradients[step]:
            assert own[MATRIX] is not None
            own[MATRIX][ROW] = value
    config = {"feedback": "ef21", "ratio": 0.2}
    for run in pools.of(2).run(run_native, LAYOUTS, gradients, torch.float32, config, {}):
        outputs = [step[MATRIX] for step in run.outputs]
        finite = [bool(out.isfinite().all()) for out in outputs]  # type: ignore[union-attr]
        assert finite == [True, True, False, True, True]
