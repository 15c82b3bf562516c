"""Training loops that are not forward, backward, step: each as plain torch does it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from oracle_hook import LOW_RANK, SETTINGS, Observed, check, gradients_of, noise
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

pytestmark = pytest.mark.device

SMALL = {"bucket_cap_mb": 0.001}
STEPS = 4


def network(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(DEVICE)


def values_of(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


# --- two that play against each other -------------------------------------------------------------


def play(wrap: Any, rank: int, world_size: int, backwards: int) -> Observed:
    """D learns from real and made-up inputs, in one backward or two; then G, while D is frozen."""
    g, d = network(6, 16, 10), network(10, 16, 8)
    maker, judge = wrap(g, **SMALL), wrap(d, **SMALL)
    optimizers = {m: torch.optim.SGD(m.parameters(), lr=0.05) for m in (g, d)}
    seen: Observed = []
    for step in range(STEPS):
        z = noise(100 * step + rank, 5, 6)
        d.requires_grad_(True)
        optimizers[d].zero_grad()
        real = judge(noise(100 * step + 50 + rank, 5, 10)).square().mean()
        if backwards == 2:
            real.backward()
        made_up = judge(maker(z).detach()).sub(1).square().mean()
        (made_up if backwards == 2 else real + made_up).backward()
        seen += gradients_of(d)
        optimizers[d].step()
        d.requires_grad_(False)
        optimizers[g].zero_grad()
        d(maker(z)).square().mean().backward()
        seen += gradients_of(g)
        optimizers[g].step()
    return seen + values_of(g) + values_of(d)


@pytest.mark.parametrize("backwards", [1, 2])
def test_two_that_play_against_each_other(ranks: Ranks, backwards: int) -> None:
    check(ranks, play, backwards)


# --- optimizers -----------------------------------------------------------------------------------


def close_over(wrap: Any, rank: int, world_size: int) -> Observed:
    """LBFGS asks for the loss and its gradient several times a step."""
    module = network(10, 16, 9)
    ddp = wrap(module, **SMALL)
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3, history_size=4)
    seen: Observed = []
    for step in range(STEPS):
        x = noise(10 * step + rank, 5, 10)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = ddp(x).square().mean()
            loss.backward()
            loss = loss.detach() / world_size  # alike on all ranks: they must end together
            dist.all_reduce(loss)
            return loss

        seen.append(optimizer.step(closure).reshape(1))
        seen += gradients_of(module)
    return seen + values_of(module)


def test_closures_that_are_called_several_times_a_step(ranks: Ranks) -> None:
    # LBFGS divides by differences of gradients, and low rank's last bits differ most.
    settings = [setting for setting in SETTINGS if setting not in LOW_RANK]
    for trials in check(ranks, close_over, settings=settings):
        assert all(trial.steps[0] > STEPS for trial in trials)


def average_weights(wrap: Any, rank: int, world_size: int) -> Observed:
    module = network(10, 16, 9)
    ddp = wrap(module, **SMALL)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    ema = AveragedModel(ddp.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(STEPS):
        optimizer.zero_grad()
        ddp(noise(10 * step + rank, 5, 10)).square().mean().backward()
        optimizer.step()
        ema.update_parameters(ddp.module)
    return [*values_of(ema), *values_of(module)]


def test_moving_averages_of_the_weights(ranks: Ranks) -> None:
    check(ranks, average_weights)


def shard_the_optimizer(wrap: Any, rank: int, world_size: int, options: dict[str, Any]) -> Observed:
    module = network(10, 16, 12, 9)
    ddp = wrap(module, gradient_as_bucket_view=True, **SMALL)
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(), optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.5, **options
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        ddp(noise(10 * step + rank, 5, 10)).square().mean().backward()
        optimizer.step()
    return values_of(module)  # type: ignore[return-value]


@pytest.mark.parametrize("options", [{}, {"parameters_as_bucket_view": True}], ids=str)
def test_zero_redundancy_optimizer(ranks: Ranks, options: dict[str, Any]) -> None:
    check(ranks, shard_the_optimizer, options)
