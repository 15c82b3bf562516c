"""Peak memory of training with each method, against what the plan says that it keeps.

A LLaMA-like model, real steps on short sequences, a new process a rank and method; the kernel's own
count of the most that a process has held (VmHWM) and of what it holds behind the last step (VmRSS),
of the rank that held most. "beyond dense": what a method holds more than DDP's plain averaging,
which has Gloo's own buffers for its buckets in it. "planned": error feedback (`State.plan()`) and
the two payloads (its bytes on the wire). When DDP makes its buckets anew, in the second step, old
and new error feedback are there together.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from llama import SIZES, Llama
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

import arc_topk

METHODS = {
    "dense": None,
    "ARC-Top-K": {"wire_dtype": torch.float32},
    "ARC-Top-K, bf16": {"wire_dtype": torch.bfloat16, "sketch_dtype": torch.bfloat16},
    "ARC-Top-K, uint8": {"wire_dtype": torch.uint8, "sketch_dtype": torch.bfloat16},
    "ARC-Top-K EF21M": {"feedback": "ef21m"},
    "low rank": {"compressor": "low_rank", "rank": 4, "wire_dtype": torch.float32},
    "Rand-K": {"compressor": "rand_k"},
    "Top-K": {"compressor": "top_k"},
}
STEPS, TOKENS = 5, 16
EXAMPLES = """\
examples:
  python benchmarks/memory.py                   58 M parameters, 2 ranks, ratio 0.1: a minute
  python benchmarks/memory.py --model 25m --ratio 0.2
"""


def held(what: str) -> int:
    """Bytes that this process holds ("VmRSS"), or the most that it has held ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {what}; expected Linux")


def rank_main(rank: int, ranks: int, method: str, model: str, ratio: float, folder: str) -> None:
    """Trains for some steps; leaves this rank's peak and what is planned in a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Llama(SIZES[model]))
    planned = 0
    fields = METHODS[method]
    if fields is not None:
        state = arc_topk.register(ddp, ratio=ratio, **fields)
        plan = state.plan()
        planned = plan.state_bytes + plan.wire_bytes
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        ddp(torch.randint(0, 256, (1, TOKENS + 1))).backward()
        optimizer.step()
    Path(folder, f"rank_{rank}").write_text(f"{held('VmHWM')} {held('VmRSS')} {planned}")
    dist.barrier()
    dist.destroy_process_group()


def measure(method: str, args: argparse.Namespace) -> tuple[int, ...]:
    """Peak, bytes held in the end, and planned bytes, of the rank that held most."""
    with tempfile.TemporaryDirectory() as folder:
        given = (args.ranks, method, args.model, args.ratio, folder)
        mp.spawn(rank_main, args=given, nprocs=args.ranks)
        texts = [Path(folder, f"rank_{rank}").read_text() for rank in range(args.ranks)]
    return max(tuple(map(int, text.split())) for text in texts)


def main() -> int:
    """Runs the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", choices=SIZES, default="60m", help="default %(default)s")
    p.add_argument("--ranks", type=int, default=2, help="default %(default)s")
    p.add_argument("--ratio", type=float, default=0.1, help="default %(default)s")
    args = p.parse_args()
    if args.ranks < 1:
        p.error(f"--ranks is {args.ranks}; expected 1 or more")
    console = Console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("MB")
    for column in ("peak", "beyond dense", "in the end", "beyond dense", "planned"):
        table.add_column(column, justify="right")
    dense: tuple[int, ...] = ()
    for method in track(list(METHODS), console=Console(stderr=True), transient=True):
        peak, end, planned = measure(method, args)
        dense = dense or (peak, end)
        numbers = (peak, peak - dense[0], end, end - dense[1], planned)
        table.add_row(method, *(f"{n / 1e6:,.0f}" for n in numbers))
    console.print(f"{args.model}, {args.ranks} ranks, ratio {args.ratio:g}, {STEPS} steps")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
