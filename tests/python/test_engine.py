"""The native engine under real DDP against the oracle, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model import Gradients, backward, random_gradients, wrap
from ranks import Pools, Ranks
from torch import Tensor

import arc_topk
from arc_topk.reference import Oracle, flatten

pytestmark = pytest.mark.device

# One row, one column, a vector, 1 element, 7 elements, no last row of full width under row_width, a
# channels_last convolution, a matrix wide enough for several registers.
LAYOUTS = [
    torch.empty(40, 24, device="meta"),
    torch.empty(7, device="meta"),
    torch.empty(1, 96, device="meta"),
    torch.empty(96, 1, device="meta"),
    torch.empty(1, device="meta"),
    torch.empty(12, 6, 3, 3, device="meta").to(memory_format=torch.channels_last),
    torch.empty(33, 70, device="meta"),
    torch.empty(101, device="meta"),
]
STEPS = 4
# Relative to gradients of size 1. float32: order of summation. The others: rounding of the result,
# and on a narrow wire of the sums on their way, over the steps.
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-11, torch.bfloat16: 8e-2, torch.float16: 1e-2}
# Within which the oracle's scores must agree with a selection.
SELECTION = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}

# Where bytes are rounded to a step the last bit may decide, so that one of two is a step away:
# test_levels.py compares those, and allows for it.
FLOAT32: dict[str, Any] = {"wire_dtype": torch.float32}


@dataclass
class Run:
    """What one rank saw."""

    outputs: list[list[Tensor | None]]
    metrics: dict[str, Any]
    wire_bytes: int


def run_native(
    rank: int,
    world_size: int,
    layouts: Sequence[Tensor],
    gradients: Gradients,
    dtype: torch.dtype,
    config: dict[str, Any],
    ddp: dict[str, Any],
) -> Run:
    model = wrap(layouts, dtype, **ddp)
    state = arc_topk.register(model, **config)
    outputs = [backward(model, step[rank]) for step in gradients]
    return Run(outputs, state.metrics(), state.plan().wire_bytes)


def picked_rows(oracle: Oracle, output: Tensor, before: Tensor | None, t: int) -> Tensor | None:
    """Which rows the engine sent, read off the result: not zero, or in h not as before."""
    view = oracle.views[t]
    if not view.compressed or oracle.compressor != "arc_topk" or not oracle.started:
        return None
    flat = flatten(output.double(), oracle.layouts[t])
    if before is not None:
        flat = flat - flatten(before.double(), oracle.layouts[t])
    rows = view.matrix(flat).any(dim=1).nonzero().flatten()
    return rows if len(rows) == view.k else None


def picks_of(
    oracle: Oracle, outputs: Sequence[Tensor | None], before: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """`picked_rows` of every tensor; ``before``: the outputs of the step before."""
    shared = oracle.feedback in ("ef21", "ef21m")
    return [
        None if out is None else picked_rows(oracle, out, before[t] if shared else None, t)
        for t, out in enumerate(outputs)
    ]


def check_against_oracle(
    runs: list[Run],
    layouts: Sequence[Tensor],
    gradients: Gradients,
    dtype: torch.dtype,
    config: dict[str, Any],
) -> Oracle:
    oracle = Oracle(layouts, dtype, len(runs), **config)
    wire = config.get("wire_dtype") or dtype
    types = [dtype, dtype if wire == torch.uint8 else wire]  # sums of integers are exact
    if config.get("compressor") == "low_rank":
        types.append(torch.float32)  # of W, whatever the gradients are
    narrowest = max(types, key=lambda d: TOLERANCE[d])
    near = TOLERANCE[narrowest]
    if config.get("compressor") == "low_rank" and narrowest.itemsize == 2:
        near *= 3  # what the wire's sums round goes into the next W, and from there into all of C
    before: list[Tensor | None] = [None] * len(layouts)
    zeros = [torch.zeros_like(t, device="cpu", dtype=dtype) for t in layouts]
    for number, step in enumerate(gradients):
        for run in runs[1:]:
            assert_same_bits(run.outputs[number], runs[0].outputs[number])
        got = runs[0].outputs[number]
        filled = [
            [like if g is None else g for g, like in zip(own, zeros, strict=True)] for own in step
        ]
        selected = picks_of(oracle, got, before)
        results = oracle.step(filled, selected=selected, rtol=SELECTION[narrowest])
        for t, (out, result) in enumerate(zip(got, results, strict=True)):
            if out is None:
                continue
            torch.testing.assert_close(
                out.double(),
                result.output.double(),
                rtol=near,
                atol=near,
                msg=lambda m, t=t, n=number: f"step {n}, tensor {t} {tuple(layouts[t].shape)}: {m}",
            )
            before[t] = out
    return oracle


def assert_same_bits(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
            assert torch.equal(x.contiguous().view(width), y.contiguous().view(width))


COMPRESSORS = ["arc_topk", "rand_k", "top_k", "dense"]
FEEDBACKS = ["none", "ef14", "ef21", "ef21m"]
LOW_RANK = [("low_rank", "none"), ("low_rank", "ef14")]
CHOICES = [*itertools.product(COMPRESSORS, FEEDBACKS), *LOW_RANK]
COMPRESSED = [choice for choice in CHOICES if choice[0] != "dense"]
REMEMBERED = [choice for choice in COMPRESSED if choice[1] != "none"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("compressor", "feedback"), CHOICES)
def test_every_choice_agrees_with_the_oracle(
    pools: Pools, compressor: str, feedback: str, world_size: int
) -> None:
    for dtype, row_width in itertools.product(DTYPES, [None, 8]):
        config = {
            "compressor": compressor,
            "feedback": feedback,
            "ratio": 0.2,
            "row_width": row_width,
            "wire_dtype": dtype,
        }
        gradients = random_gradients(LAYOUTS, world_size, STEPS, dtype)
        buckets = {"bucket_cap_mb": 0.004}  # several, and others after the rebuild
        runs = pools.of(world_size).run(run_native, LAYOUTS, gradients, dtype, config, buckets)
        oracle = check_against_oracle(runs, LAYOUTS, gradients, dtype, config)
        dense_start = feedback in ("ef21", "ef21m") and any(v.compressed for v in oracle.views)
        assert runs[0].wire_bytes == oracle.wire_bytes
        if not dense_start and compressor != "dense":
            assert runs[0].metrics["wire_bytes"] == STEPS * oracle.wire_bytes


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compressor", ["arc_topk", "rand_k", "top_k"])
def test_wire_types_feed_their_rounding_back(
    ranks: Ranks, compressor: str, dtype: torch.dtype, wire: torch.dtype
) -> None:
    for feedback in ("ef14", "ef21m"):
        config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, "wire_dtype": wire}
        gradients = random_gradients(LAYOUTS, 2, STEPS, dtype)
        runs = ranks.run(run_native, LAYOUTS, gradients, dtype, config, {})
        check_against_oracle(runs, LAYOUTS, gradients, dtype, config)


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_state_in_bfloat16(ranks: Ranks, feedback: str) -> None:
    config = {"feedback": feedback, "ratio": 0.2, "state_dtype": torch.bfloat16, **FLOAT32}
    for dtype in (torch.float32, torch.bfloat16):
        gradients = random_gradients(LAYOUTS, 2, STEPS, dtype)
        runs = ranks.run(run_native, LAYOUTS, gradients, dtype, config, {})
        oracle = Oracle(LAYOUTS, dtype, 2, **config)
        assert runs[0].wire_bytes == oracle.wire_bytes
        # bf16 state is rounded every step, so only the size of the error is asked for.
        for number, step in enumerate(gradients):
            assert_same_bits(runs[0].outputs[number], runs[1].outputs[number])
            if feedback == "none":
                continue
            for t, result in enumerate(oracle.step(step)):
                out = runs[0].outputs[number][t]
                assert out is not None and out.isfinite().all()
                if result.kind == "dense":
                    torch.testing.assert_close(
                        out.double(), result.output.double(), rtol=0.1, atol=0.1
                    )


def test_start_step_is_plain_averaging(ranks: Ranks) -> None:
    for feedback in FEEDBACKS:
        config = {"feedback": feedback, "ratio": 0.2, "start_step": 2, **FLOAT32}
        gradients = random_gradients(LAYOUTS, 2, STEPS + 1, torch.float32)
        runs = ranks.run(run_native, LAYOUTS, gradients, torch.float32, config, {})
        check_against_oracle(runs, LAYOUTS, gradients, torch.float32, config)
        started = 1 if feedback in ("ef21", "ef21m") else 0
        assert runs[0].metrics["compressed_steps"] == STEPS + 1 - 2 - started
