"""The uint8 wire: rows as integers whose sum over ranks cannot overflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from arc_topk.reference import Levels, Oracle, best_step, most_level, unit_of

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


def test_each_step_has_the_least_mean_squared_error() -> None:
    for n in RANKS:
        assert best_step(most_level(n)) == pytest.approx(minimiser(most_level(n)), abs=1e-6)
    # Max, "Quantizing for Minimum Distortion" (1960), table II: 7 levels.
    assert best_step(3) == pytest.approx(0.6508, abs=1e-4)


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
        sent = [codec.send(xi) for xi in x]
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
            assert torch.equal(torch.where(cut, xi, ci + rest), xi)
            assert ((rest.abs() <= 0.5001 * codec.unit) | cut | (codec.unit == 0)).all()
            assert (rest.abs() <= xi.abs() * (1 + 1e-6)).all() or n == 1


def test_a_rows_unit_is_of_the_elements_that_it_has() -> None:
    x = [torch.tensor([[3.0, 4.0], [5.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])]
    codec = Levels(2, torch.float32, 3).fitted(x, torch.tensor([0, 1]))
    c = best_step(63)
    expected = torch.tensor([[c * math.sqrt(12.5) / 2], [c * 3.0]])
    torch.testing.assert_close(codec.unit, expected, rtol=2**-15, atol=0)


def test_a_row_of_zeros_is_sent_as_zeros() -> None:
    x = [torch.zeros(2, 3), torch.zeros(2, 3)]
    codec = Levels(2, torch.float32, 6).fitted(x, torch.tensor([0, 1]))
    sent = [codec.send(xi) for xi in x]
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
    """C_i + e_i = g_i + e_i(old): to the bit where x was not cut off, which is almost all."""
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
            assert (after == before).float().mean() > 0.99
            torch.testing.assert_close(after, before, rtol=3e-7, atol=0)


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
