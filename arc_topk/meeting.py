"""All ranks of a process group come together, or those that came learn who did not.

A collective that one rank never calls keeps the others for the group's time-out, half an hour by
default, and then tells them of a closed connection. So ranks meet first, at the group's key-value
store: that breaks nothing, and a meeting that was called off may be held again.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

# Ranks come out of DDP's constructor together, so one that is this late at what follows it will
# hardly come at all.
WAIT = timedelta(seconds=60)
# After this long a warning says who is waited for.
PATIENCE = timedelta(seconds=10)
_LONGEST_NAP_S = 0.05


def meet(group: dist.ProcessGroup, call: str, wait: timedelta) -> None:
    """Returns when every rank of ``group`` has called it: a collective, without the network's.

    Args:
        group: a group without a store is taken to be complete.
        call: what the user has called, for messages.
        wait: for those who are not there yet.

    Raises:
        RuntimeError: on every rank that was there, if some were not; names them.
    """
    raw = group.get_group_store()
    if group.size() == 1 or raw is None:
        return
    store = PrefixStore("arc_topk/meetings", raw)
    # Meetings are numbered by the store and not by each rank, who may have missed some.
    number = store.add("settled", 0)
    missing = [group.rank()]
    while group.rank() in missing:  # that meeting was over before this rank came: to the next one
        while store.check([f"{number}/outcome"]):
            number += 1
        missing = _attend(store, number, group, call, wait)
    if missing:
        raise RuntimeError(
            f"arc_topk: {call} is a collective, which every rank of the process group must call; "
            f"{_named(missing, group)} did not within {wait.total_seconds():.0f} s. Look there for "
            "an earlier error, or for a branch that leaves the call out"
        )


def _attend(
    store: PrefixStore, number: int, group: dist.ProcessGroup, call: str, wait: timedelta
) -> list[int]:
    """Takes part in one meeting: who was missing, the same on every rank."""
    rank, size = group.rank(), group.size()
    begin = time.monotonic()
    warn_at = begin + PATIENCE.total_seconds()
    give_up_at = begin + wait.total_seconds()
    nap = 0.0005
    try:
        store.set(f"{number}/{rank}", "here")
        if store.add(f"{number}/count", 1) == size:
            _settle(store, number, rank, [])
        while not store.check([f"{number}/outcome"]):
            now = time.monotonic()
            if now >= min(warn_at, give_up_at):
                missing = [r for r in range(size) if not store.check([f"{number}/{r}"])]
                if now >= give_up_at:  # with nobody missing, one of them came and went
                    _settle(store, number, rank, missing)
                elif missing:
                    _warn(call, _named(missing, group), wait)
                warn_at = math.inf
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_S)
    except BaseException:  # an interrupt, for one: nobody may count on this rank any more
        _settle(store, number, rank, [rank])
        raise
    outcome: dict[str, list[int]] = json.loads(store.get(f"{number}/outcome"))
    return outcome["missing"]


def _warn(call: str, missing: str, wait: timedelta) -> None:
    warnings.warn(
        f"arc_topk: {call} is a collective and has waited {PATIENCE.total_seconds():.0f} s for "
        f"{missing}; it gives up after {wait.total_seconds():.0f} s",
        stacklevel=8,  # who has called register() or bind()
    )


def _settle(store: PrefixStore, number: int, rank: int, missing: Sequence[int]) -> None:
    """Ends a meeting; the first to end it decides how, and counts it."""
    mine = json.dumps({"by": rank, "missing": missing})
    if store.compare_set(f"{number}/outcome", "", mine) == mine.encode():
        store.add("settled", 1)


def _named(ranks: Sequence[int], group: dist.ProcessGroup) -> str:
    """Ranks by the numbers that users know: the world's."""
    everywhere = dist.get_process_group_ranks(group)
    numbers = [str(everywhere[rank]) for rank in ranks]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
