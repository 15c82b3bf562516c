"""Collectives that a rank does not call: the others learn who is missing, and nothing is broken."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from model import backward, random_gradients, wrap
from ranks import Ranks, message_of, temporary
from torch import nn
from torch._C._distributed_c10d import PrefixStore
from torch.nn.parallel import DistributedDataParallel

import arc_topk
from arc_topk import meeting, state

pytestmark = pytest.mark.device

LAYOUTS = [torch.zeros(64, 32)]
# No test may have to wait for the group's time-out where a shorter wait is meant.
LONG = timedelta(seconds=120)
SHORT = timedelta(seconds=5)


def shorten() -> None:
    state.WAIT = SHORT


def step(ddp: DistributedDataParallel, rank: int, world_size: int) -> torch.Tensor:
    gradient = random_gradients(LAYOUTS, world_size, 1, torch.float32)[0][rank]
    averaged = backward(ddp, gradient)[0]
    assert averaged is not None
    return averaged


def leave_one_out(rank: int, world_size: int, way: str) -> tuple[str, torch.Tensor]:
    """Rank 1 does something else, then all do as they should."""
    shorten()
    ddp = wrap(LAYOUTS, torch.float32)
    state = arc_topk.State(ratio=0.25)
    ways: dict[str, Callable[[], Any]] = {
        "register": lambda: arc_topk.register(ddp, ratio=0.25),
        "bind": lambda: state.bind(ddp),
    }
    texts = {"no_ddp": lambda: arc_topk.register(nn.Linear(2, 2)), "nothing": lambda: None}
    call, instead = way.split(" without ")
    text = message_of(ways[call] if rank != 1 else texts[instead])
    dist.barrier()  # else rank 1's second call would meet the others' first, and heal at once
    if call == "bind":
        ddp.register_comm_hook(state, arc_topk.arc_topk_hook)
    ways[call]()
    return text, step(ddp, rank, world_size)


@pytest.mark.parametrize("call", ["register", "bind"])
@pytest.mark.parametrize("instead", ["no_ddp", "nothing"])
def test_who_is_missing_is_named_and_a_second_call_heals(call: str, instead: str) -> None:
    with temporary(3, LONG) as pool:
        (zero, a), (one, b), (two, c) = pool.run(leave_one_out, f"{call} without {instead}")
    for text in (zero, two):
        assert text.startswith("RuntimeError") and "is a collective" in text
        assert "rank 1 did not within 5 s" in text and f"{call}(ddp)" in text
    assert one == "" if instead == "nothing" else "no DDP instance" in one
    assert torch.equal(a, b) and torch.equal(a, c)


def come_late(rank: int, world_size: int) -> tuple[list[str], torch.Tensor]:
    """Rank 1 comes when the others have given up; nobody's second try may meet a first one."""
    shorten()
    ddp = wrap(LAYOUTS, torch.float32)
    store = dist.group.WORLD.get_group_store()
    if rank == 1:
        store.wait(["given up"], LONG)
    texts = [message_of(lambda: arc_topk.register(ddp, ratio=0.25))]
    if rank == 0:
        store.set("given up", "")
        store.wait(["late one gave up"], LONG)
    elif texts[0]:
        store.set("late one gave up", "")
    if texts[0]:
        texts.append(message_of(lambda: arc_topk.register(ddp, ratio=0.25)))
    return texts, step(ddp, rank, world_size)


def test_a_rank_that_comes_too_late_waits_anew() -> None:
    with temporary(2, LONG) as pool:
        (zero, a), (one, b) = pool.run(come_late)
    assert "rank 1 did not" in zero[0] and zero[1] == ""
    assert "rank 0 did not" in one[0] and one[1] == ""
    assert torch.equal(a, b)


def on_a_subgroup(rank: int, world_size: int) -> str:
    shorten()
    members = dist.new_group([1, 2])
    if rank == 0:
        return ""
    ddp = wrap(LAYOUTS, torch.float32, process_group=members)
    return "" if rank == 2 else message_of(lambda: arc_topk.register(ddp))


def test_ranks_are_named_by_the_worlds_numbers() -> None:
    with temporary(3, LONG) as pool:
        texts = pool.run(on_a_subgroup)
    assert "rank 2 did not" in texts[1]


def first_bucket(rank: int, world_size: int) -> str:
    """Rank 1 forgets the hook: the engine's first bucket waits for it, not its Gloo."""
    ddp = wrap(LAYOUTS, torch.float32)
    if rank == 1:
        return ""
    ddp.register_comm_hook(arc_topk.State(), arc_topk.arc_topk_hook)
    return message_of(lambda: step(ddp, rank, world_size))


def make_exchange(rank: int, world_size: int) -> str:
    tensors = [torch.zeros(3, 3, device=DEVICE)]
    return "" if rank == 1 else message_of(lambda: arc_topk.GradientExchange(tensors))


@pytest.mark.parametrize(
    ("body", "call"),
    [(first_bucket, "State that is not bound"), (make_exchange, "GradientExchange")],
)
def test_others_wait_for_the_groups_time_out(body: Callable[..., str], call: str) -> None:
    """Ranks do not come there together: a slow start is no error."""
    with temporary(2, timedelta(seconds=12)) as pool:
        text = pool.run(body)[0]
    assert call in text and "rank 1 did not within 12 s" in text


def wait_with_a_warning(rank: int, world_size: int) -> list[str]:
    meeting.PATIENCE = timedelta(seconds=0.5)
    ddp = wrap(LAYOUTS, torch.float32)
    store = dist.group.WORLD.get_group_store()
    if rank == 1:
        store.wait(["warned"], LONG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if rank == 0:
            # Rank 1 comes when rank 0 has warned, however long that takes.
            warnings.showwarning = lambda *args, **_: (
                store.set("warned", ""),
                caught.append(args[0]),
            )
        arc_topk.register(ddp)
    return [str(one) for one in caught]


def test_a_wait_says_for_whom_before_it_ends() -> None:
    with temporary(2, LONG) as pool:
        texts, _ = pool.run(wait_with_a_warning)
    assert len(texts) == 1 and "has waited" in texts[0] and "for rank 1;" in texts[0]


def interrupt(rank: int, world_size: int) -> str:
    """Rank 0 is interrupted while it waits; who comes then is not told that it is there."""
    ddp = wrap(LAYOUTS, torch.float32)
    store = dist.group.WORLD.get_group_store()
    if rank == 0:
        signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C, wherever tests run
        # Again and again: Python drops what is raised while it lets something go.
        signal.setitimer(signal.ITIMER_REAL, 1, 1)
        try:
            arc_topk.register(ddp)
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            store.set("interrupted", "")
            arc_topk.register(ddp)
            return "interrupted"
    store.wait(["interrupted"], LONG)
    arc_topk.register(ddp)
    return "came"


def test_an_interrupted_rank_is_not_counted() -> None:
    with temporary(2, LONG) as pool:
        assert pool.run(interrupt) == ["interrupted", "came"]


def come_and_go(rank: int, world_size: int) -> float:
    """Rank 1 is lost just after it has said that it is there: nobody is missing, nobody counts."""
    store = PrefixStore("arc_topk/meetings", dist.group.WORLD.get_group_store())
    begin = time.monotonic()
    if rank == 1:
        store.set("0/1", "here")
        store.wait(["over"], LONG)
    else:
        meeting.meet(dist.group.WORLD, "meet()", SHORT)
        store.set("over", "")
    return time.monotonic() - begin


def test_a_meeting_ends_in_any_case() -> None:
    with temporary(2, LONG) as pool:
        assert pool.run(come_and_go)[0] >= SHORT.total_seconds()


def meet_many_times(rank: int, world_size: int) -> float:
    begin = time.monotonic()
    for _ in range(50):
        meeting.meet(dist.group.WORLD, "meet()", LONG)
    return (time.monotonic() - begin) / 50


def test_meetings_follow_one_another(ranks: Ranks) -> None:
    assert max(ranks.run(meet_many_times)) < 10  # and 1 ms where nothing else runs
