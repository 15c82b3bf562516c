"""The uint8 wire: rows as integers whose sum over ranks cannot overflow."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from model import Gradients, random_gradients
from ranks import Pools
from test_engine import (
    DTYPES,
    FEEDBACKS,
    LAYOUTS,
    STEPS,
    TOLERANCE,
    Run,
    assert_same_bits,
    check_against_oracle,
    picks_of,
    run_native,
)

import arc_topk
from arc_topk.plan import make_plan
from arc_topk.reference import Levels, Oracle, best_step, most_level, reach, unit_of

RANKS = range(1, 33)

# --- levels and their step
# ------------------------------------------------------------------------------


def mean_squared_error(step: float, most: int) -> float:
    """Of N(0, 1), rounded to the multiples of `step` from -most to most.

    E[x^2] - 2 E[x q] + E[q^2], where q = k step between the bounds of level k.
    """
    bounds = [(k + 0.5) * step for k in range(-most, most)]
    edges = [-math.inf, *bounds, math.inf]
    density = [math.exp(-b * b / 2) / math.sqrt(2 * math.pi) for b in edges]
    below = [math.erfc(-b / math.sqrt(2)) / 2 for b in edges]
    error = 1.0
    for i, k in enumerate(range(-most, most + 1)):
        error -= 2 * k * step * (density[i] - density[i + 1])
        error += (k * step) ** 2 * (below[i + 1] - below[i])
    return error


def minimiser(most: int) -> float:
    """By golden sections."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 0.01, 1.5
    while high - low > 1e-8:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if mean_squared_error(a, most) < mean_squared_error(b, most):
            high = b
        else:
            low = a
    return (low + high) / 2


def engines_table(name: str) -> list[float]:
    header = Path(__file__).parents[2] / "csrc" / "kernels" / "levels.h"
    (table,) = re.findall(name + r"\[\w+\] = \{([^}]*)\}", header.read_text())
    return [float(number) for number in table.split(",")]


def test_each_step_has_the_least_mean_squared_error() -> None:
    table = engines_table("kBestStep")
    assert len(table) == len(RANKS)
    for n, step in zip(RANKS, table, strict=True):
        found = minimiser(most_level(n))
        assert step == pytest.approx(found, abs=2e-6), f"{n} ranks"
        assert step == best_step(most_level(n))
    # Max, "Quantizing for Minimum Distortion" (1960), table II: 7 levels.
    assert table[31] == pytest.approx(0.6508, abs=1e-4)


def test_each_reach_is_that_of_its_levels() -> None:
    assert engines_table("kReach") == pytest.approx([reach(n) for n in RANKS], abs=1e-9)


def test_levels_are_odd_in_number_and_their_sum_fits_a_byte() -> None:
    for n in RANKS:
        h = most_level(n)
        assert 2 * h + 1 in (255 // n + 1, 255 // n)
        assert 2 * h * n <= 255 and h == 127 // n


# --- the oracle's identities
# ------------------------------------------------------------------------------


def extreme_rows(world_size: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Of each rank: rows of usual numbers and of whatever else a finite number can be."""
    chance = torch.Generator().manual_seed(seed)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    sizes = [1.0, 0.0, largest, -largest, smallest, smallest / 4, 1e-20, 1e20, 1.0, 1.0]
    own = []
    for rank in range(world_size):
        x = torch.randn(len(sizes), 7, generator=chance, dtype=torch.float64).to(dtype)
        x = x.clamp(-1, 1) * torch.tensor(sizes, dtype=dtype)[:, None]
        x[8] = 0.0
        x[8, 3] = 1.0  # one element
        x[9] = 1.0 if rank == 0 else 0.0  # one rank
        x[2:4, 0] = largest
        own.append(x)
    return own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_sum_overflows_and_what_is_not_sent_stays(dtype: torch.dtype) -> None:
    for n in RANKS:
        x = extreme_rows(n, dtype, n)
        rows = torch.arange(x[0].shape[0])
        codec = Levels(n, dtype, x[0].numel()).fitted(x, rows)
        sent = [codec.send(xi, rank) for rank, xi in enumerate(x)]
        h = most_level(n)
        assert all(int(u.max()) <= 2 * h for u in sent)
        assert int(torch.stack(sent).sum(dim=0).max()) <= 255
        own = [codec.value(u) for u in sent]
        mean = codec.mean(sent)
        assert torch.stack(own).isfinite().all() and mean.isfinite().all()
        if dtype == torch.float32:
            # Units have so few bits that their products with levels are exact: so is the mean, but
            # for its division by N.
            exact = torch.stack(own).double().mean(dim=0)
            normal = codec.unit >= torch.finfo(dtype).smallest_normal * n
            rtol = 0 if n & (n - 1) == 0 else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(mean.double() * normal, exact * normal, rtol=rtol, atol=0)
        for xi, ci, u in zip(x, own, sent, strict=True):
            rest = xi - ci
            cut = (u == 0) | (u == 2 * h)
            lost = ((ci + rest).double() - xi.double()).abs()
            assert (cut | (lost <= codec.unit.double() * torch.finfo(dtype).eps)).all()
            assert ((rest.abs() <= 1.0001 * codec.unit) | cut | (codec.unit == 0)).all()


@pytest.mark.parametrize("world_size", RANKS)
def test_staggered_thresholds_add_up_to_finer_levels(world_size: int) -> None:
    """Ranks that are alike do not err alike: the sum of their levels is N x / D within one."""
    chance = torch.Generator().manual_seed(world_size)
    row = torch.randn(1, 500, generator=chance, dtype=torch.float64)
    codec = Levels(world_size, torch.float64, 500).fitted([row] * world_size, torch.tensor([0]))
    sent = [codec.send(row, rank) for rank in range(world_size)]
    error = (codec.mean(sent) - row).abs() * world_size / codec.unit
    assert (error[row.abs() < codec.unit * (most_level(world_size) - 1)] <= 0.51).all()


def test_a_rows_unit_is_of_the_elements_that_it_has() -> None:
    x = [torch.tensor([[3.0, 4.0], [5.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])]
    codec = Levels(2, torch.float32, 3).fitted(x, torch.tensor([0, 1]))
    c = best_step(63)
    expected = torch.tensor([[c * math.sqrt(12.5) / 2], [c * 3.0]])
    torch.testing.assert_close(codec.unit, expected, rtol=2**-15, atol=0)


def test_a_row_of_zeros_is_sent_as_zeros() -> None:
    x = [torch.zeros(2, 3), torch.zeros(2, 3)]
    codec = Levels(2, torch.float32, 6).fitted(x, torch.tensor([0, 1]))
    sent = [codec.send(xi, rank) for rank, xi in enumerate(x)]
    assert all((u == 63).all() for u in sent)
    assert not codec.mean(sent).any() and not codec.unit.any()
    subnormal = torch.full((2,), 1e-42)
    assert not unit_of(subnormal, 2).any()


def oracle_of(feedback: str, world_size: int, **config: Any) -> Oracle:
    layouts = [torch.empty(20, 16, device="meta"), torch.empty(5, device="meta")]
    fields = {"feedback": feedback, "ratio": 0.2, "wire_dtype": torch.uint8, **config}
    return Oracle(layouts, torch.float32, world_size, **fields)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 32])
def test_ef14_loses_nothing(world_size: int) -> None:
    """C_i + e_i = g_i + e_i(old), to the last bit but one of what is added."""
    oracle = oracle_of("ef14", world_size)
    chance = torch.Generator().manual_seed(1)
    for _ in range(8):
        old = [own[0].e.clone() for own in oracle.states]
        g = [
            [torch.randn(20, 16, generator=chance), torch.randn(5, generator=chance)]
            for _ in range(world_size)
        ]
        result = oracle.step(g)[0]
        assert result.compressed is not None
        for i, own in enumerate(result.compressed.own):
            before = g[i][0].flatten() + old[i]
            after = own.flatten() + oracle.states[i][0].e
            torch.testing.assert_close(after, before, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("feedback", ["ef21", "ef21m"])
def test_the_shared_estimate_hardly_drifts(feedback: str) -> None:
    oracle = oracle_of(feedback, 4, resync_every=0)
    chance = torch.Generator().manual_seed(1)
    for _ in range(400):
        shared = torch.randn(20, 16, generator=chance)
        oracle.step(
            [[shared + torch.randn(20, 16, generator=chance), torch.zeros(5)] for _ in range(4)]
        )
    h = oracle.state("h", 0, 0).double()
    mean = torch.stack([oracle.state("h_i", i, 0).double() for i in range(4)]).mean(dim=0)
    assert float((h - mean).norm() / h.norm()) < 1e-6


def test_a_constant_gradient_arrives_whole() -> None:
    """EF14: what every step rounds and cuts off comes later; the sum of C follows that of g."""
    oracle = oracle_of("ef14", 3, ratio=0.3)
    chance = torch.Generator().manual_seed(2)
    g = [[torch.randn(20, 16, generator=chance), torch.zeros(5)] for _ in range(3)]
    mean = torch.stack([own[0] for own in g]).mean(dim=0)
    total = torch.zeros(20, 16)
    errors = []
    for step in range(1, 121):
        total += oracle.step(g)[0].output
        errors.append(float((total / step - mean).norm() / mean.norm()))
    assert errors[-1] < 0.05 and errors[-1] < errors[20] / 3


# --- what is chosen, and what it costs
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ["rand_k", "top_k", "dense"])
def test_compressors_without_a_first_collective_refuse_it(compressor: str) -> None:
    with pytest.raises(ValueError, match="wire_dtype") as raised:
        arc_topk.Config(compressor=compressor, wire_dtype=torch.uint8)
    named = ("wire_dtype is torch.uint8", f"'{compressor}'", "'arc_topk'", "'low_rank'", "bfloat16")
    for words in named:
        assert words in str(raised.value)


def test_the_plan_counts_bytes_and_units() -> None:
    config = arc_topk.Config(ratio=0.1, wire_dtype=torch.uint8)
    named = [("w", torch.empty(1000, 256)), ("b", torch.empty(256))]
    plan = make_plan(config, named, 4)
    assert plan.rows[0].wire_bytes == 4 * 5 * 1000 + 4 + 100 * 256
    assert [row.wire_dtype for row in plan.rows] == [torch.uint8, torch.float32]
    assert plan.notes == ()
    for n in (32, 33, 64):
        plan = make_plan(config, named, n)
        oracle = Oracle([t for _, t in named], torch.float32, n, ratio=0.1, wire_dtype=torch.uint8)
        assert plan.wire_bytes == oracle.wire_bytes
        assert plan.rows[0].wire_dtype == (torch.uint8 if n <= 32 else torch.bfloat16)
        said = f"rows travel in torch.bfloat16: torch.uint8 has too few levels for {n} ranks"
        assert (said in str(plan)) == (n > 32)


# --- the engine against the oracle
# ------------------------------------------------------------------------------

# A unit that another order of summation has rounded otherwise moves an element to the level beside
# it, one in ten thousand or so.
FEW = 0.005


def compare(
    runs: list[Run],
    layouts: Sequence[torch.Tensor],
    gradients: Gradients,
    dtype: torch.dtype,
    config: dict[str, Any],
) -> None:
    if dtype == torch.float64:  # where that does not happen
        check_against_oracle(runs, layouts, gradients, dtype, config)
        return
    n = len(runs)
    oracle = Oracle(layouts, dtype, n, **config)
    before: list[torch.Tensor | None] = [None] * len(layouts)
    close = TOLERANCE[dtype]
    compared = far = 0
    for number, step in enumerate(gradients):
        got = runs[0].outputs[number]
        for run in runs[1:]:
            assert_same_bits(run.outputs[number], got)
        picked = picks_of(oracle, got, before)
        results = oracle.step(step, selected=picked, rtol=1e-2)
        for t, (out, result) in enumerate(zip(got, results, strict=True)):
            assert out is not None
            difference = (out.double() - result.output.double()).abs()
            is_far = difference > close * (1 + result.output.double().abs())
            where = f"step {number}, tensor {t}"
            if result.kind == "dense":
                assert not is_far.any(), where
            else:
                # A level is c rms / N of the message, which is a few times the gradient's 1.4.
                assert difference.max() < 10 * best_step(most_level(n)) / n, where
                compared += out.numel()
                far += int(is_far.sum())
            before[t] = out
    assert far <= FEW * compared, f"{far} of {compared} elements are apart"


@pytest.mark.device
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_the_engine_agrees_with_the_oracle(pools: Pools, feedback: str, world_size: int) -> None:
    for dtype, row_width in itertools.product(DTYPES, [None, 8]):
        config = {
            "feedback": feedback,
            "ratio": 0.2,
            "row_width": row_width,
            "wire_dtype": torch.uint8,
        }
        gradients = random_gradients(LAYOUTS, world_size, STEPS, dtype)
        buckets = {"bucket_cap_mb": 0.004}
        runs = pools.of(world_size).run(run_native, LAYOUTS, gradients, dtype, config, buckets)
        compare(runs, LAYOUTS, gradients, dtype, config)
        oracle = Oracle(LAYOUTS, dtype, world_size, **config)
        assert runs[0].wire_bytes == oracle.wire_bytes
        if feedback in ("none", "ef14"):
            assert runs[0].metrics["wire_bytes"] == STEPS * oracle.wire_bytes


@pytest.mark.device
@pytest.mark.parametrize("row_width", [1, 7])
def test_rows_of_any_width(pools: Pools, row_width: int) -> None:
    """A short last row, and rows of one element, for which units cost more than they save."""
    config = {
        "feedback": "ef14",
        "ratio": 0.2,
        "sketch_dim": 1,
        "row_width": row_width,
        "wire_dtype": torch.uint8,
    }
    gradients = random_gradients(LAYOUTS, 2, STEPS, torch.float32)
    runs = pools.of(2).run(run_native, LAYOUTS, gradients, torch.float32, config, {})
    compare(runs, LAYOUTS, gradients, torch.float32, config)
    plan = make_plan(arc_topk.Config(**config), [("w", torch.empty(40, 24))], 2)
    assert bool(plan.rows[0].kept) == (row_width == 7)


@pytest.mark.device
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_a_gradient_that_is_not_finite_on_one_rank(pools: Pools, feedback: str) -> None:
    gradients = random_gradients(LAYOUTS, 3, 5, torch.float32)
    spoilt = gradients[2][1][0]
    assert spoilt is not None
    spoilt[3, 5] = math.nan
    config = {"feedback": feedback, "ratio": 0.2, "wire_dtype": torch.uint8}
    runs = pools.of(3).run(run_native, LAYOUTS, gradients, torch.float32, config, {})
    for run in runs:
        for number, outputs in enumerate(run.outputs):
            assert_same_bits(outputs, runs[0].outputs[number])
            for t, out in enumerate(outputs):
                assert out is not None
                assert bool(out.isfinite().all()) == ((number, t) != (2, 0))


@pytest.mark.device
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-18, 1e30])
def test_numbers_of_any_size_are_sent_or_stay(pools: Pools, size: float) -> None:
    """EF14: what all ranks send in sum, and what they still owe, is what they were given."""
    layouts = [torch.empty(12, 40, device="meta")]
    gradients = random_gradients(layouts, 2, 30, torch.float32)
    for number, step in enumerate(gradients):
        for own in step:
            assert own[0] is not None
            own[0].mul_(size if number < 3 else 0.0)
    config = {"feedback": "ef14", "ratio": 0.25, "sketch_dim": 1, "wire_dtype": torch.uint8}
    runs = pools.of(2).run(run_native, layouts, gradients, torch.float32, config, {})
    total = torch.stack([outputs[0].double() for outputs in runs[0].outputs]).sum(dim=0)
    given = torch.stack([own[0].double() for step in gradients for own in step]).sum(dim=0) / 2
    assert total.isfinite().all()
    if size <= 1e-38:  # too small for a unit: all of it is still owed
        assert not total.any()
    else:
        torch.testing.assert_close(total, given, rtol=1e-3, atol=1e-3 * size)
