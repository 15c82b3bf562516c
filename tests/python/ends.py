"""A program, not a test: two ranks train, then end in one of many ways. `test_ddp_ends.py` runs it.

    python ends.py FOLDER

forks two ranks for each way, and waits for both. They end as programs do, through Python's own
finalization. A line of JSON for each rank: the way, the exit code (a signal's number negative;
None: it did not end), its seconds from the way's beginning on; what it printed is FOLDER/WAY.RANK.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch._dynamo  # as DDP does: once here, not in every rank
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk

WAYS: dict[str, Callable[[int, str], None]] = {}
LIMIT_S = 60.0
# A collective in the air is given up at once, never waited for so long.
TIMEOUT = timedelta(seconds=300)
HELD: dict[str, Any] = {}  # lives as long as the interpreter


def way(name: str) -> Callable[[Callable[[int, str], None]], Callable[[int, str], None]]:
    def add(end: Callable[[int, str], None]) -> Callable[[int, str], None]:
        WAYS[name] = end
        return end

    return add


def train(standard: bool = False) -> None:
    """Two steps of three buckets, what they were made of in HELD."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 20), nn.Linear(20, 9))
    ddp = DistributedDataParallel(module, bucket_cap_mb=0.001)
    if standard:
        state = arc_topk.State(ratio=0.25, feedback="ef21m")
        ddp.register_comm_hook(state, arc_topk.arc_topk_hook)
        state.bind(ddp)
    else:
        state = arc_topk.register(ddp, ratio=0.25, feedback="ef21m")
    HELD.update(ddp=ddp, state=state, module=module)
    for _ in range(2):
        step()


def step() -> None:
    HELD["ddp"](torch.ones(3, 10)).square().mean().backward()


# --- ways -----------------------------------------------------------------------------------------


@way("nothing is done")
def _nothing(rank: int, folder: str) -> None:
    train()


@way("nothing is done, standard form")
def _standard(rank: int, folder: str) -> None:
    train(standard=True)


@way("the group is destroyed")
def _destroyed(rank: int, folder: str) -> None:
    train()
    dist.destroy_process_group()


@way("the group is destroyed, standard form")
def _destroyed_standard(rank: int, folder: str) -> None:
    train(standard=True)
    dist.destroy_process_group()


@way("the group is destroyed, then a backward pass")
def _backward_behind(rank: int, folder: str) -> None:
    train()
    dist.barrier()
    dist.destroy_process_group()
    step()  # as plain DDP, which holds its group itself
    HELD["state"].metrics()


@way("the group is destroyed and made again")
def _again(rank: int, folder: str) -> None:
    train()
    dist.destroy_process_group()
    start(rank, f"{folder}/again")
    train()


@way("an exit handler looks")
def _atexit(rank: int, folder: str) -> None:
    train()
    atexit.register(lambda: print(HELD["state"].metrics()["steps"], HELD["state"].plan()))
    atexit.register(dist.destroy_process_group)


@way("a daemon thread looks on")
def _daemon(rank: int, folder: str) -> None:
    train()
    state = HELD["state"]

    def look() -> None:
        while True:
            state.metrics()

    threading.Thread(target=look, daemon=True).start()


@way("a cycle holds it")
def _cycle(rank: int, folder: str) -> None:
    train()
    HELD["state"].itself = HELD["state"]
    HELD.clear()
    dist.destroy_process_group()


@way("an exchange without DDP")
def _exchange(rank: int, folder: str) -> None:
    exchange = arc_topk.GradientExchange([torch.zeros(16, 12)], ratio=0.25)
    exchange.all_reduce_([torch.ones(16, 12)])
    HELD.update(exchange=exchange)
    dist.destroy_process_group()


@way("an error that nobody catches")
def _raises(rank: int, folder: str) -> None:
    train()
    raise ArithmeticError("the user's own")


@way("a bucket in the air")
def _in_the_air(rank: int, folder: str) -> None:
    """Rank 0's first bucket waits for rank 1's, which never comes, while rank 0 ends."""
    train()
    if rank == 1:
        while not os.path.exists(f"{folder}/rank 0 has ended"):
            time.sleep(0.05)
        return

    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError("half-way")

    HELD["module"][0].weight.register_hook(fail)
    try:
        step()
    except ArithmeticError:
        return


def letting_go(order: tuple[str, ...]) -> Callable[[int, str], None]:
    def end(rank: int, folder: str) -> None:
        train()
        HELD.pop("module")
        for what in order:
            if what == "group":
                dist.destroy_process_group()
            else:
                HELD.pop(what)
                gc.collect()

    return end


for order in itertools.permutations(("ddp", "state", "group")):
    WAYS["let go of: " + ", ".join(order)] = letting_go(order)


# --- running them ---------------------------------------------------------------------------------


def start(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=TIMEOUT
    )


def fork(name: str, rank: int, folder: str) -> int:
    """The process id of a rank. In the rank it does not return: SystemExit ends the program."""
    sys.stdout.flush()
    if (pid := os.fork()) != 0:
        return pid
    output = os.open(f"{folder}/{name}.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    start(rank, f"{folder}/{name}.store")
    WAYS[name](rank, folder)
    raise SystemExit


def wait_for(pid: int, until: float) -> int | None:
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main(folder: str) -> None:
    gc.freeze()  # what is here already is no rank's to collect
    for name in WAYS:
        begun = time.monotonic()
        pids = [fork(name, rank, folder) for rank in (0, 1)]
        for rank, pid in enumerate(pids):
            code = wait_for(pid, begun + LIMIT_S)
            if name == "a bucket in the air" and rank == 0:
                open(f"{folder}/rank 0 has ended", "w").close()
            took = time.monotonic() - begun
            print(json.dumps({"way": name, "rank": rank, "code": code, "seconds": took}))


if __name__ == "__main__":
    main(sys.argv[1])
