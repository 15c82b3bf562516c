"""Between one step and the next: accumulation, unused parameters, joins, changed gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import DEVICE, copy_to
from model import Gradients, Pick, random_gradients
from oracle_hook import LOW_RANK, SETTINGS, Observed, Trial, check, gradients_of
from ranks import Pools, Ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.device

SHAPES = [(20, 12), (7,), (9, 16), (12, 10)]
LAYOUTS = [torch.empty(shape, device="meta") for shape in SHAPES]
SMALL = {"bucket_cap_mb": 0.0006}
FINDING = {"find_unused_parameters": True, **SMALL}
EF14 = [setting for setting in SETTINGS if setting["feedback"] == "ef14"]


def module_of_zeros() -> Pick:
    return Pick([torch.zeros(shape, device=DEVICE) for shape in SHAPES])


def gradients_for(world_size: int, steps: int) -> Gradients:
    return random_gradients(LAYOUTS, world_size, steps, torch.float32)


def backward(ddp: DistributedDataParallel, own: list[Tensor | None], sync: bool = True) -> None:
    if sync:
        ddp(copy_to(DEVICE, own)).backward()
        return
    with ddp.no_sync():
        ddp(copy_to(DEVICE, own)).backward()


# --- no_sync --------------------------------------------------------------------------------------


def accumulate(wrap: Any, rank: int, world_size: int, options: dict[str, Any]) -> Observed:
    """Rank 0 makes two backwards that are not synchronised and rank 1 one; once none and three."""
    module = module_of_zeros()
    ddp = wrap(module, **options)
    gradients = gradients_for(world_size, 12)
    seen: Observed = []
    for step in range(4):
        ddp.zero_grad(set_to_none=step % 2 == 0)
        extra = 2 - rank if step != 2 else 3 * rank
        for part in range(extra):
            backward(ddp, gradients[3 * step + part][rank], sync=False)
        backward(ddp, gradients[11 - step][rank])
        seen += gradients_of(module)
    return seen


@pytest.mark.parametrize("options", [SMALL, {"gradient_as_bucket_view": True, **SMALL}])
def test_uneven_accumulation(ranks: Ranks, options: dict[str, Any]) -> None:
    check(ranks, accumulate, options)


def used_in_no_sync_only(wrap: Any, rank: int, world_size: int) -> Observed:
    """Tensor 0 on both ranks, tensor 2 on rank 1; both used as usual in every third step."""
    module = module_of_zeros()
    ddp = wrap(module, **FINDING)
    gradients = gradients_for(world_size, 12)
    seen: Observed = []
    for step in range(6):
        ddp.zero_grad()
        backward(ddp, gradients[step][rank], sync=False)
        own = list(gradients[6 + step][rank])
        if step % 3:
            own[0] = None
            own[2] = None if rank == 1 else own[2]
        backward(ddp, own)
        seen += gradients_of(module)
    return seen


def test_parameters_used_in_no_sync_only(ranks: Ranks) -> None:
    for trials in check(ranks, used_in_no_sync_only):
        assert all(t is not None for trial in trials for t in trial.got)


def without_zeroing(wrap: Any, rank: int, world_size: int, options: dict[str, Any]) -> Observed:
    """Backwards into what is there already: DDP hands over the average with a gradient on top."""
    module = module_of_zeros()
    ddp = wrap(module, **options)
    seen: Observed = []
    for step, gradients in enumerate(gradients_for(world_size, 5)):
        if step == 3:
            ddp.zero_grad(set_to_none=False)
        backward(ddp, gradients[rank])
        seen += gradients_of(module)
    return seen


@pytest.mark.parametrize("view", [False, True])
def test_gradients_that_are_not_zeroed(ranks: Ranks, view: bool) -> None:
    check(ranks, without_zeroing, {"gradient_as_bucket_view": view, **SMALL})


# --- between backward and step --------------------------------------------------------------------


def change(wrap: Any, rank: int, world_size: int, view: bool) -> Observed:
    """Clipped, scaled, overwritten, taken away: what is done to .grad never reaches the state."""
    module = module_of_zeros()
    ddp = wrap(module, gradient_as_bucket_view=view, **SMALL)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
    seen: Observed = []
    for step, gradients in enumerate(gradients_for(world_size, 6)):
        backward(ddp, gradients[rank])
        seen += gradients_of(module)
        seen.append(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5))
        for p in module.parameters():
            p.grad.mul_(3)  # type: ignore[union-attr]
        if step % 2:
            module.tensors[0].grad.fill_(float("nan"))  # type: ignore[union-attr]
            module.tensors[0].grad = None
        optimizer.step()
        seen += [p.detach().clone() for p in module.parameters()]
        optimizer.zero_grad(set_to_none=step % 3 == 0)
    return seen


@pytest.mark.parametrize("view", [False, True])
def test_gradients_read_and_changed_before_the_step(ranks: Ranks, view: bool) -> None:
    check(ranks, change, view)


# --- unused parameters ----------------------------------------------------------------------------


def leave_unused(wrap: Any, rank: int, world_size: int, steps: int) -> Observed:
    """Tensor 0 is not used for `steps` steps, tensor 2 not on rank 1; then both are again."""
    module = module_of_zeros()
    ddp = wrap(module, **FINDING)
    gradients = gradients_for(world_size, 6)
    seen: Observed = []

    def step(own: list[Tensor | None]) -> None:
        ddp.zero_grad()
        backward(ddp, own)

    for own in gradients[:3]:
        step(own[rank])
        seen += gradients_of(module)
    for i in range(steps):
        own = list(gradients[i % 6][rank])
        own[0] = None
        own[2] = None if rank == 1 else own[2]
        step(own)
        if i in (0, 1, steps - 1):
            seen += gradients_of(module)
    for own in gradients[3:]:
        step(own[rank])
        seen += gradients_of(module)
    return seen


@pytest.mark.parametrize(
    ("steps", "settings"),
    [(100, [s for s in SETTINGS if s not in LOW_RANK]), (10, LOW_RANK)],
    ids=["by row or element", "low rank"],
)
def test_unused_for_a_hundred_steps_and_then_back(
    ranks: Ranks, steps: int, settings: list[dict[str, Any]]
) -> None:
    for trials in check(ranks, leave_unused, steps, settings=settings):
        for trial in trials:
            unused = [out is None for out in trial.got[::4]]
            assert unused == 3 * [False] + 3 * [True] + 3 * [False]
            assert all(out is not None for out in trial.got[2::4]), "rank 0 has used it"


QUIET = 40
TINY = 1e-30


def owe_and_pay(wrap: Any, rank: int, world_size: int) -> Observed:
    """Sums of what came and went: gradients, steps in which nobody or one rank uses a tensor, and
    then tiny gradients until everything owed is paid."""
    module = module_of_zeros()
    ddp = wrap(module, **FINDING)
    gradients = gradients_for(world_size, 4)
    sums = [torch.zeros(shape, device=DEVICE) for shape in SHAPES]
    tiny: list[Tensor | None] = [torch.full(shape, TINY) for shape in SHAPES]
    steps = [list(own[rank]) for own in gradients]
    steps[1][0] = None
    steps[2][0] = None
    steps[2][2] = None if rank == 1 else steps[2][2]
    for own in steps + [tiny] * QUIET:
        ddp.zero_grad()
        backward(ddp, own)
        for total, p in zip(sums, module.parameters(), strict=True):
            if p.grad is not None:
                total += p.grad
    return sums  # type: ignore[return-value]


def check_all_is_paid(by_rank: list[list[Trial]], given: Gradients) -> None:
    """What came out is the mean of what went in: nothing was lost."""
    for t, _ in enumerate(SHAPES):
        parts = [g for step in given for own in step if (g := own[t]) is not None]
        for trial in by_rank[0]:
            torch.testing.assert_close(
                trial.got[t], sum(parts) / len(by_rank), rtol=1e-4, atol=1e-4
            )


def test_no_residual_is_lost_to_steps_that_do_not_use_a_parameter(ranks: Ranks) -> None:
    given = gradients_for(2, 4)
    for own in given[1]:
        own[0] = None
    for own in given[2]:
        own[0] = None
    given[2][1][2] = None
    check_all_is_paid(check(ranks, owe_and_pay, settings=EF14), given)


# --- join -----------------------------------------------------------------------------------------


def uneven_inputs(
    wrap: Any, rank: int, world_size: int, options: dict[str, Any], divide: bool
) -> Observed:
    """Two epochs; rank i has 4 - i inputs in each."""
    module = module_of_zeros()
    ddp = wrap(module, **options)
    gradients = gradients_for(world_size, 8)
    seen: Observed = []
    for epoch in range(2):
        with ddp.join(divide_by_initial_world_size=divide):
            for own in gradients[4 * epoch : 4 * epoch + 4 - rank]:
                ddp.zero_grad()
                backward(ddp, own[rank])
                seen += gradients_of(module)
    return seen


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("options", [SMALL, FINDING], ids=["", "finding unused parameters"])
def test_uneven_inputs_under_join(pools: Pools, options: dict[str, Any], divide: bool) -> None:
    """`divide` False means nothing: torch tells no hook of it."""
    check(pools.of(3), uneven_inputs, options, divide, alike=False)


def owe_and_join(wrap: Any, rank: int, world_size: int) -> Observed:
    """Rank 1 leaves after two steps; rank 0 goes on with tiny gradients."""
    module = module_of_zeros()
    ddp = wrap(module, **SMALL)
    sums = [torch.zeros(shape, device=DEVICE) for shape in SHAPES]
    tiny: list[Tensor | None] = [torch.full(shape, TINY) for shape in SHAPES]
    steps = [own[rank] for own in gradients_for(world_size, 2)]
    with ddp.join():
        for own in steps + ([] if rank else [tiny] * QUIET):
            ddp.zero_grad()
            backward(ddp, own)
            for total, p in zip(sums, module.parameters(), strict=True):
                assert p.grad is not None
                total += p.grad
    return sums  # type: ignore[return-value]


def test_who_has_joined_pays_what_it_owes(ranks: Ranks) -> None:
    check_all_is_paid(check(ranks, owe_and_join, settings=EF14, alike=False), gradients_for(2, 2))
