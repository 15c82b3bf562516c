"""Trains under torchrun, and kills rank 1 once: for test_elastic.py.

    torchrun --max-restarts 1 elastic.py FOLDER KILL_AT

Rank 0 writes the parameters at the end, and how often the job was restarted, into FOLDER/end.pt.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk

STEPS = 9
SAVE_EVERY = 2


def connect(restarts: int) -> None:
    """`init_process_group("gloo")`, but for a flaw in torch 2.15.

    The agent's store outlives a restart, and Gloo then finds addresses of the life before in it: in
    three of five runs of a script without arc_topk it could not connect.
    """
    server = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(f"life {restarts}", dist.TCPStore(*server, is_master=False))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def main(folder: Path, kill_at: int) -> None:
    """One life of one rank."""
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    connect(restarts)
    rank = dist.get_rank()
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 7)))
    state = arc_topk.register(ddp, ratio=0.2, feedback="ef21m")
    optimizer = torch.optim.Adam(ddp.parameters(), 0.01)
    step = 0
    if (folder / "latest").exists():
        step = int((folder / "latest").read_text())
        content = torch.load(folder / str(step) / "model.pt", weights_only=True)
        ddp.module.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        state.load(folder / str(step))
    while step < STEPS:
        if restarts == 0 and step == kill_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.manual_seed(100 * step + rank)
        optimizer.zero_grad()
        ddp(torch.randn(8, 40)).square().mean().backward()
        optimizer.step()
        step += 1
        if step % SAVE_EVERY == 0:
            state.save(folder / str(step))
            if rank == 0:
                content = {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(content, folder / str(step) / "model.pt")
                (folder / "latest.partial").write_text(str(step))
                (folder / "latest.partial").replace(folder / "latest")
    if rank == 0:
        torch.save(([p.detach() for p in ddp.parameters()], restarts), folder / "end.pt")
    del ddp, state
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
