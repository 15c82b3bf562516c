"""A first collective in bfloat16: half its bytes, and nothing of the gradient lost by it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from device import DEVICE
from model import Gradients, backward, random_gradients, wrap
from ranks import Pools, Ranks
from test_engine import (
    FEEDBACKS,
    LAYOUTS,
    LOW_RANK,
    STEPS,
    TOLERANCE,
    assert_same_bits,
    picks_of,
    run_native,
)
from torch import Tensor

import arc_topk
from arc_topk.plan import make_plan
from arc_topk.reference import Oracle

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
SMALL_BUCKETS = {"bucket_cap_mb": 0.004}


# --- what is chosen, and what it costs
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ["rand_k", "top_k", "dense"])
def test_compressors_without_sketches_refuse_it(compressor: str) -> None:
    with pytest.raises(ValueError, match="sketch_dtype") as raised:
        arc_topk.Config(compressor=compressor, sketch_dtype=BF16)
    for words in ("sketch_dtype is torch.bfloat16", f"'{compressor}'", "'arc_topk'", "'low_rank'"):
        assert words in str(raised.value)


@pytest.mark.parametrize("wrong", [torch.float16, torch.float32, torch.uint8, "bf16"])
def test_other_types_are_refused(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"sketch_dtype.*bfloat16"):
        arc_topk.Config(sketch_dtype=wrong)


def test_low_rank_on_bytes_has_one_type() -> None:
    with pytest.raises(ValueError, match=r"sketch_dtype is torch\.bfloat16.*expected None"):
        arc_topk.Config(compressor="low_rank", wire_dtype=U8, sketch_dtype=BF16)


NAMED = [("w", torch.empty(1000, 256)), ("b", torch.empty(256))]


@pytest.mark.parametrize(
    ("config", "matrix", "dense"),
    [
        # Dense tensors go beside the rows, which are float32.
        ({"wire_dtype": F32}, 2 * (4 * 1000 + 1) + 4 * 100 * 256, F32),
        ({"wire_dtype": BF16}, 2 * (4 * 1000 + 1) + 2 * 100 * 256, BF16),
        ({"wire_dtype": U8, "sketch_dim": 1}, 2 * (2 * 1000 + 1) + 100 * 256, BF16),
        ({"compressor": "low_rank", "rank": 3}, 2 * (3 * 1000 + 1) + 4 * 3 * 256, F32),
        # 0.1 x 4 x 256000 bytes, whatever a dense tensor travels in.
        (
            {"compressor": "low_rank", "ratio": 0.1, "wire_dtype": BF16},
            2 * (40 * 1000 + 1) + 2 * 40 * 256,
            BF16,
        ),
    ],
)
def test_bytes_and_types_of_the_plan(
    config: dict[str, Any], matrix: int, dense: torch.dtype
) -> None:
    config = {"ratio": 0.1, "sketch_dtype": BF16, **config}
    plan = make_plan(arc_topk.Config(**config), NAMED, 4)
    oracle = Oracle([t for _, t in NAMED], F32, 4, **config)
    assert [row.wire_bytes for row in plan.rows] == [matrix, 256 * dense.itemsize]
    assert plan.rows[1].wire_dtype == oracle.types.dense == dense
    assert plan.wire_bytes == oracle.wire_bytes


@pytest.mark.parametrize("config", [{}, {"sketch_dtype": BF16}, {"wire_dtype": BF16}])
def test_float64_keeps_its_range(config: dict[str, Any]) -> None:
    """bfloat16 ends at 3.4e38: a dense tensor's larger numbers would be infinite in it."""
    named = [(name, tensor.double()) for name, tensor in NAMED]
    plan = make_plan(arc_topk.Config(**config), named, 4)
    assert plan.rows[1].why_dense and plan.rows[1].wire_dtype == torch.float64


# --- the engine against the oracle
# ------------------------------------------------------------------------------


@pytest.mark.device
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_rows_are_as_exact_as_ever(pools: Pools, feedback: str, world_size: int) -> None:
    """Another sketch may pick other rows; what it picks is averaged to the last digits."""
    for dtype, narrow in itertools.product([F32, torch.float64, BF16], [False, True]):
        wire = BF16 if narrow else dtype
        config = {"feedback": feedback, "ratio": 0.2, "wire_dtype": wire, "sketch_dtype": BF16}
        gradients = random_gradients(LAYOUTS, world_size, STEPS, dtype)
        runs = pools.of(world_size).run(
            run_native, LAYOUTS, gradients, dtype, config, SMALL_BUCKETS
        )
        oracle = Oracle(LAYOUTS, dtype, world_size, **config)
        before: list[Tensor | None] = [None] * len(LAYOUTS)
        for number, step in enumerate(gradients):
            got = runs[0].outputs[number]
            for run in runs[1:]:
                assert_same_bits(run.outputs[number], got)
            picked = picks_of(oracle, got, before)
            results = oracle.step(step, selected=picked, rtol=5e-2)  # type: ignore[arg-type]
            for t, (out, result) in enumerate(zip(got, results, strict=True)):
                assert out is not None
                travels = oracle.types.wire if result.kind == "compressed" else oracle.types.dense
                near = max(TOLERANCE[dtype], TOLERANCE[travels])
                torch.testing.assert_close(
                    out.double(), result.output.double(), rtol=near, atol=near,
                    msg=lambda m, at=(dtype, wire, number, t): f"{at}: {m}",
                )  # fmt: skip
                before[t] = out
        assert runs[0].wire_bytes == oracle.wire_bytes
        if feedback in ("none", "ef14"):
            assert runs[0].metrics["wire_bytes"] == STEPS * oracle.wire_bytes


def applied_and_owed(
    rank: int, world_size: int, gradients: Gradients, config: dict[str, Any]
) -> tuple[list[list[Tensor | None]], dict[str, Any]]:
    model = wrap(LAYOUTS, F32, **SMALL_BUCKETS)
    state = arc_topk.register(model, **config)
    outputs = [backward(model, step[rank]) for step in gradients]
    return outputs, state.state_dict(gather=False)


@pytest.mark.device
@pytest.mark.parametrize(
    ("compressor", "wire"),
    [("arc_topk", None), ("arc_topk", U8), *((name, None) for name in {n for n, _ in LOW_RANK})],
)
def test_what_was_applied_and_what_is_owed_is_what_was_given(
    pools: Pools, compressor: str, wire: torch.dtype | None
) -> None:
    for world_size in (1, 2, 4):
        config = {"compressor": compressor, "ratio": 0.2, "wire_dtype": wire, "sketch_dtype": BF16}
        gradients = random_gradients(LAYOUTS, world_size, 6, F32)
        runs = pools.of(world_size).run(applied_and_owed, gradients, config)
        oracle = Oracle(LAYOUTS, F32, world_size, **config)
        compressed = [t for t, view in enumerate(oracle.views) if view.compressed]
        assert compressed
        for t in compressed:
            given = torch.stack([own[t] for step in gradients for own in step]).double()  # type: ignore[misc]
            applied = torch.stack([out[t].double() for out in runs[0][0]]).sum(dim=0)  # type: ignore[union-attr]
            owed = [
                run[1]["own"][f"rank_{i}"][f"tensors.{t}"]["a"].double()
                for i, run in enumerate(runs)
            ]
            total = applied + torch.stack(owed).mean(dim=0)
            torch.testing.assert_close(total, given.sum(dim=0) / world_size, rtol=1e-4, atol=1e-4)


@pytest.mark.device
@pytest.mark.skipif(not LOW_RANK, reason="low rank has no kernels here")
@pytest.mark.parametrize("wire", [None, BF16])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_narrow_first_factor_is_the_oracles(
    pools: Pools, wire: torch.dtype | None, world_size: int
) -> None:
    """Of the first step: a last bit of P that is rounded otherwise goes into all of C."""
    config = {"compressor": "low_rank", "rank": 2, "wire_dtype": wire, "sketch_dtype": BF16}
    gradients = random_gradients(LAYOUTS, world_size, 1, F32)
    runs = pools.of(world_size).run(run_native, LAYOUTS, gradients, F32, config, SMALL_BUCKETS)
    oracle = Oracle(LAYOUTS, F32, world_size, **config)
    results = oracle.step(gradients[0])  # type: ignore[arg-type]
    wide = Oracle(LAYOUTS, F32, world_size, **{**config, "sketch_dtype": None})
    others = wide.step(gradients[0])  # type: ignore[arg-type]
    far, between = [], []
    for out, result, other in zip(runs[0].outputs[0], results, others, strict=True):
        assert out is not None
        if result.kind == "compressed":
            far.append(float((out - result.output).norm() / result.output.norm()))
            between.append(float((other.output - result.output).norm() / result.output.norm()))
    assert len(far) >= 3
    # Few of P's elements are rounded otherwise: not one in a hundred, or far would be `between`.
    assert sum(far) < 0.3 * sum(between), (far, between)


def exchange_under_inference(rank: int, world_size: int) -> list[Tensor]:
    tensors = [torch.ones(40, 24, device=DEVICE), torch.ones(7, device=DEVICE)]
    exchange = arc_topk.GradientExchange(tensors, ratio=0.5, wire_dtype=U8, sketch_dtype=BF16)
    with torch.inference_mode():
        exchange.all_reduce_([t.clone() for t in tensors])
    return [out.cpu() for out in exchange.all_reduce_([t.clone() for t in tensors])]


@pytest.mark.device
def test_buffers_first_needed_in_inference_mode_serve_outside(ranks: Ranks) -> None:
    zero, one = ranks.run(exchange_under_inference)
    assert_same_bits(zero, one)
    assert zero[0].any() and torch.equal(zero[1], torch.ones(7))


@pytest.mark.device
@pytest.mark.parametrize("compressor", ["arc_topk", *sorted({name for name, _ in LOW_RANK})])
def test_flags_survive_the_narrow_type(ranks: Ranks, compressor: str) -> None:
    """NaN on one rank is NaN on all, for that tensor alone; and nobody is put off by it."""
    gradients = random_gradients(LAYOUTS, 2, 4, F32)
    spoilt = gradients[2][1][0]
    assert spoilt is not None
    spoilt[3, 5] = math.nan
    config = {"compressor": compressor, "ratio": 0.2, "sketch_dtype": BF16}
    runs = ranks.run(run_native, LAYOUTS, gradients, F32, config, SMALL_BUCKETS)
    for run in runs:
        for number, outputs in enumerate(run.outputs):
            assert_same_bits(outputs, runs[0].outputs[number])
            for t, out in enumerate(outputs):
                assert out is not None
                assert bool(out.isfinite().all()) == ((number, t) != (2, 0))


def leave_out(rank: int, world_size: int, config: dict[str, Any]) -> list[Tensor]:
    tensors = [torch.zeros(40, 24, device=DEVICE), torch.zeros(33, 70, device=DEVICE)]
    exchange = arc_topk.GradientExchange(tensors, **config)
    given = [torch.ones(40, 24, device=DEVICE) if rank == 0 else None, None]
    return [out.cpu() for out in exchange.all_reduce_(given, none_as_zero=True)]


@pytest.mark.device
def test_unused_on_some_ranks_and_on_all(ranks: Ranks) -> None:
    zero, one = ranks.run(leave_out, {"ratio": 0.5, "wire_dtype": F32, "sketch_dtype": BF16})
    assert_same_bits(zero, one)
    rows = zero[0].any(dim=1)
    assert int(rows.sum()) == 20 and torch.equal(zero[0][rows], torch.full((20, 24), 0.5))
    assert not zero[1].any()
