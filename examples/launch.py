"""Starts the ranks, and checks at the end that they hold the same model."""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


def launch(work: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Calls ``work(options)`` on every rank: torchrun's, or ``options.ranks`` of our own.

    Returns:
        The exit status.
    """
    if "RANK" in os.environ:
        _choose_device(options, int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(_backend(options))
        _work_and_leave(work, options)
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share this machine's cores
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_spawned, (work, options, f"{folder}/store"), nprocs=options.ranks)
        except mp.ProcessExitedException as error:
            print(f"a rank failed: {error}", file=sys.stderr)
            return error.exit_code or 1
    return 0


def _spawned(
    rank: int, work: Callable[[argparse.Namespace], None], options: argparse.Namespace, store: str
) -> None:
    # A file as meeting point needs no free port, so several runs never get in each other's way.
    _choose_device(options, rank)
    dist.init_process_group(
        _backend(options), init_method=f"file://{store}", rank=rank, world_size=options.ranks
    )
    _work_and_leave(work, options)


def _work_and_leave(
    work: Callable[[argparse.Namespace], None], options: argparse.Namespace
) -> None:
    failed = False
    try:
        work(options)
    except RunFailedError as error:  # raised on every rank: one of them reports it
        failed = True
        if dist.get_rank() == 0:
            print(f"FAILED: {error}", file=sys.stderr, flush=True)
    # A DDP that outlives its process group can abort the interpreter at exit (torch 2.15).
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    if failed:
        sys.exit(1)


def device_of(options: argparse.Namespace) -> torch.device:
    """What this rank trains on."""
    if options.device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _choose_device(options: argparse.Namespace, local_rank: int) -> None:
    """Takes this rank's GPU; one line if there is none."""
    if options.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            sys.exit(
                f"--device is cuda, but rank {local_rank} of this machine finds "
                f"{torch.cuda.device_count()} GPUs; expected one for each rank: lower --ranks"
            )
        torch.cuda.set_device(local_rank)


def _backend(options: argparse.Namespace) -> str:
    """Gloo for what lies on the CPU (Python objects, validation), NCCL for gradients on GPUs."""
    return "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo"


class RunFailedError(RuntimeError):
    """A run cannot go on, or broke a promise checked at its end; raised on every rank alike."""


def check_same_parameters(model: nn.Module) -> None:
    """Compares all parameters across ranks, bit for bit.

    Raises:
        RunFailedError: on every rank, naming the first parameter that differs.
    """
    digests = {
        name: hashlib.sha256(memoryview(p.detach().cpu().contiguous().view(-1).numpy())).hexdigest()
        for name, p in model.named_parameters()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    for name in digests:
        different = [
            rank for rank, other in enumerate(everyone) if other[name] != everyone[0][name]
        ]
        if different:
            raise RunFailedError(
                f"parameter {name} of ranks {different} differs from that of rank 0 after training"
            )
