"""Ranks that stay up between runs: a process each, over Gloo."""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from typing import Any

TIMEOUT = timedelta(minutes=5)


class Ranks:
    """A process group of ``count`` processes. Use it as a context manager."""

    def __init__(self, count: int) -> None:
        # The server imports torch once and forks from there.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "numpy"])
        store = tempfile.mkdtemp(prefix="evidence-") + "/store"
        self.count = count
        self._processes = [
            ProcessPoolExecutor(1, context, initializer=_join, initargs=(rank, count, store))
            for rank in range(count)
        ]

    def call(self, body: Callable[..., Any], *args: Any) -> Any:
        """``body(*args)`` on every rank: rank 0's result.

        Raises:
            Exception: a rank's; the ranks are then of no further use.
        """
        futures = [process.submit(body, *args) for process in self._processes]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        return futures[0].result()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.call(_leave)
        for process in self._processes:
            if kind is not None:  # ranks that wait for a lost one end with the time-out: end them
                for worker in list((process._processes or {}).values()):
                    worker.kill()
            process.shutdown(cancel_futures=True)


def _join(rank: int, count: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=TIMEOUT
    )


def _leave() -> None:
    import torch.distributed as dist

    gc.collect()  # a DDP that outlives its process group can abort the interpreter at exit
    dist.barrier()
    dist.destroy_process_group()
