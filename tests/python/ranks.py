"""Ranks for tests: a few processes that stay up, so that a test costs milliseconds and not imports.

    def body(rank, world_size, x): ...          # at a test module's top level
    results = ranks.run(body, x)                # a list, one result a rank

A rank that raises fails the test with its traceback. A pool in which anything went wrong is torn
down, so that no later test inherits a half-done collective.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import resource
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = timedelta(seconds=60)


class RankError(AssertionError):
    """What a rank raised: its text holds every failed rank's traceback."""


class Ranks:
    """A process group of ``world_size`` processes, each waiting for something to run."""

    def __init__(self, world_size: int, timeout: timedelta = TIMEOUT) -> None:
        self.world_size = world_size
        self._timeout = timeout
        # The server imports torch once and forks from there: a clean process in 10 ms. It makes no
        # CUDA context, which a fork could not use: each rank makes its own when it first needs it.
        context = multiprocessing.get_context("forkserver")
        # DDP imports torch._dynamo: seconds, which no rank of any pool then needs.
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "numpy"])
        folder = tempfile.mkdtemp(prefix="ranks-")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, world_size, f"{folder}/store", timeout),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, body: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """``body(rank, world_size, *args, **kwargs)`` on every rank: their results."""
        self.start(body, *args, **kwargs)
        outcomes = [self.result(rank) for rank in range(self.world_size)]
        failures = [text for ok, text in outcomes if not ok]
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return [result for _, result in outcomes]

    def start(self, body: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """`run` without waiting for the results: `result` has them, one rank's each."""
        message = _dump((body, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(message)

    def result(self, rank: int) -> tuple[bool, Any]:
        """Whether ``rank`` has returned, and what, or its traceback."""
        # A process starts, imports and connects before it answers, on a busy machine too.
        longest = 2 * self._timeout.total_seconds() + 120
        if not self._pipes[rank].poll(longest):
            return False, f"rank {rank}: no answer in {longest} s"
        try:
            outcome: tuple[bool, Any] = _load(self._pipes[rank].recv_bytes())
        except EOFError:
            return False, f"rank {rank}: the process died"
        return outcome

    @property
    def alive(self) -> bool:
        return bool(self._pipes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes.clear()
        self._processes.clear()


class Pools:
    """Pools by world size, made when first asked for and remade after a failure."""

    def __init__(self) -> None:
        self._pools: dict[int, Ranks] = {}

    def of(self, world_size: int) -> Ranks:
        pool = self._pools.get(world_size)
        if pool is None or not pool.alive:
            pool = self._pools[world_size] = Ranks(world_size)
        return pool

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def message_of(body: Callable[[], Any]) -> str:
    """What a call raises; "" where it raises nothing."""
    try:
        body()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextlib.contextmanager
def temporary(world_size: int, timeout: timedelta) -> Iterator[Ranks]:
    """A pool of one test's own, for tests that break it."""
    pool = Ranks(world_size, timeout)
    try:
        yield pool
    finally:
        pool.close()


def _dump(value: Any) -> bytes:
    """In one piece: a pipe of multiprocessing would pass on each tensor as a file of its own."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(message: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(message), weights_only=False)


def _allow_many_files() -> None:
    """A Gloo group keeps five descriptors, and a pool makes hundreds of groups in its life."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _serve(pipe: Connection, rank: int, world_size: int, store: str, timeout: timedelta) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _allow_many_files()
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world_size)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout
    )
    while True:
        try:
            body, args, kwargs = _load(pipe.recv_bytes())
        except EOFError:  # the test process is gone, and this one's work with it
            return
        try:
            outcome = (True, body(rank, world_size, *args, **kwargs))
        except BaseException:
            outcome = (False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        pipe.send_bytes(_dump(outcome))
