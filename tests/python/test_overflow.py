"""Finite gradients whose sum over ranks is not: nothing may stay infinite, nor be lost."""

from __future__ import annotations

import pytest
import torch
from model import random_gradients
from ranks import Pools
from test_engine import LAYOUTS, run_native

pytestmark = pytest.mark.device

HUGE = 3e38  # of float32 and bfloat16 the largest is 3.4e38
MATRIX, ROW, STEP = 0, 7, 2


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
@pytest.mark.parametrize("feedback", ["none", "ef14", "ef21", "ef21m"])
@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "top_k"])
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
    outputs = [step[MATRIX] for step in runs[0].outputs]
    assert all(out is not None and out.isfinite().all() for out in outputs)
    if compressor == "arc_topk" and feedback != "ef21m":
        torch.testing.assert_close(outputs[STEP][ROW], torch.full((24,), HUGE), rtol=1e-2, atol=0)
    if feedback in ("none", "ef14"):  # what was owed has been paid, and all goes on as before
        assert outputs[-1].abs().max() < 1e3
