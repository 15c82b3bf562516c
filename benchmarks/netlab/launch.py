"""One process a rank, as torchrun starts them, each in its own namespace."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from netlab.network import INTERFACE, Network

PORT = 29500
POLL = 0.05  # seconds
GRACE = 5.0  # for the others to end by themselves, once one rank has failed


def environment(network: Network, rank: int, label: str = "") -> dict[str, str]:
    """What torch.distributed's ``env://`` and Gloo look at; NETLAB says where a rank runs."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(len(network.ranks)),
        "LOCAL_WORLD_SIZE": str(len(network.ranks)),
        "MASTER_ADDR": network.address(0),
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "TP_SOCKET_IFNAME": INTERFACE,
        "NETLAB": label,
        # No address of the lab has a name, of which torch would warn for every connection.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }


def run_ranks(
    network: Network, argv: Sequence[str], label: str = "", extra: Mapping[str, str] | None = None
) -> int:
    """Runs a Python script, ``[script, argument, ...]`` or ``["-m", module, ...]``, on every rank.

    Rank 0 writes where this process does; what the others write comes with their number in front.

    Returns:
        0, or the exit status of the rank that failed first; the others are then ended.
    """
    ranks = range(len(network.ranks))
    processes = [_start(network, rank, argv, label, extra or {}) for rank in ranks]
    try:
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _start(
    network: Network, rank: int, argv: Sequence[str], label: str, extra: Mapping[str, str]
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        network.ranks[rank].command(sys.executable, "-u", *argv),
        env={**os.environ, **environment(network, rank, label), **extra},
        stdin=subprocess.DEVNULL,
        stdout=None if rank == 0 else subprocess.PIPE,
        stderr=None if rank == 0 else subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if rank:
        threading.Thread(target=_pass_on, args=(process, rank), daemon=True).start()
    return process


def _pass_on(process: subprocess.Popen[str], rank: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        sys.stderr.write(f"[{rank}] {line}")


def _wait(processes: Sequence[subprocess.Popen[str]]) -> int:
    failed_at = None
    status = 0
    while any(process.poll() is None for process in processes):
        failed = [code for process in processes if (code := process.poll())]
        if failed and failed_at is None:
            failed_at, status = time.monotonic(), failed[0]
        if failed_at is not None and time.monotonic() - failed_at > GRACE:
            break
        time.sleep(POLL)
    return status or next((process.poll() or 0 for process in processes if process.poll()), 0)
