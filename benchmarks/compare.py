"""What a compressing hook costs, against its floor, a Python hook and PowerSGD.

One rank (the default): the cost of the hook alone. DDP's own buckets are filled with gradients and
handed to each hook, one after the other, on one rank, where collectives cost next to nothing. The
clock runs from the hook's call to its completed future: no backward pass and no copy of DDP's is in
it. For arc_topk the time of the collectives is known and taken out; what remains, prepare, select,
pack and apply, is the hook's compute. The floor is the least memory traffic that the equations
allow (floor.py), at the bandwidth of a plain streaming update measured just before.

With --ranks N: the whole exchange over N processes and loopback Gloo, all buckets in flight at
once, against DDP's own all-reduce.

The results of every hook but torch's own are verified first. All are then timed in turn, round
after round; ratios are formed within a round, so that a slow moment falls on both sides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import BASELINES, COLUMNS, COMPRESSORS, contestants_of, make_contestant
from floor import Stream
from report import hook_table, legend, machine, ranks_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from timing import WARM_UP, measure, results_of
from verification import SMALL, WrongResultError, verify
from workload import MODELS, Workload, squares

from arc_topk.config import TWO_COLLECTIVES

EXAMPLES = """\
examples:
  python benchmarks/compare.py                                  about two minutes on two cores
  python benchmarks/compare.py --feedback ef21m --ratios 0.2 --compressors arc_topk --repeat 20
  python benchmarks/compare.py --model resnet50 --ratios 0.05 0.1 0.2 --json resnet50.json
  python benchmarks/compare.py --numel 1000000 --threads 1      a quick look
  python benchmarks/compare.py --ranks 4 --baselines            the whole exchange, on loopback
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    sizes = ", ".join(
        f"{name} {sum(map(math.prod, make())) / 1e6:.0f} M" for name, make in MODELS.items()
    )
    p.add_argument("--model", choices=MODELS, default="gpt", help=f"parameter shapes ({sizes})")
    p.add_argument(
        "--numel", type=int, help="instead of a model: square matrices, this many elements"
    )
    p.add_argument(
        "--ratios", type=float, nargs="+", default=[0.1, 0.2], help="kept shares of rows"
    )
    p.add_argument("--compressors", nargs="*", choices=COMPRESSORS, default=list(COMPRESSORS))
    p.add_argument(
        "--feedback",
        nargs="+",
        choices=("none", "ef14", "ef21", "ef21m"),
        default=["ef14", "ef21m"],
    )
    p.add_argument(
        "--baselines",
        nargs="*",
        choices=BASELINES,
        default=list(BASELINES),
        help="python: ARC-Top-K of torch operations; powersgd: torch's, one rank only. Give none "
        "to leave both out",
    )
    p.add_argument(
        "--columns",
        type=int,
        default=COLUMNS,
        help=f"k of low_rank and powersgd, whatever the ratio; default {COLUMNS}",
    )
    p.add_argument(
        "--threads", type=int, nargs="+", help=f"of torch, a rank; default {[1, 2][:cores]}, or 1"
    )
    p.add_argument("--ranks", type=int, default=1, help="more than 1: time the whole exchange")
    p.add_argument("--repeat", type=int, default=7, help="timed rounds; default 7")
    p.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32"
    )
    p.add_argument(
        "--wire",
        choices=("float32", "bfloat16", "float16", "uint8"),
        help="what rows and factors travel in, of every compressor (uint8: of arc_topk and "
        "low_rank); default: --dtype",
    )
    p.add_argument("--bucket-mb", type=float, default=25, help="DDP's bucket_cap_mb; default 25")
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="also write settings, machine and results"
    )
    return p


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments, checked, with their defaults."""
    p = parser()
    args = p.parse_args(arguments)
    for name in ("numel", "ranks", "repeat", "columns"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name} is {value}; expected at least 1")
    for ratio in args.ratios:
        if not 0 < ratio <= 1:
            p.error(f"--ratios has {ratio}; expected shares in (0, 1]")
    others = [name for name in args.compressors if name not in TWO_COLLECTIVES]
    if args.wire == "uint8" and others:
        p.error(
            f"--wire is uint8 with --compressors {' '.join(others)}; expected arc_topk or low_rank"
        )
    cores = len(os.sched_getaffinity(0))
    args.threads = args.threads or ([1, 2][:cores] if args.ranks == 1 else [1])
    if min(args.threads) < 1:
        p.error(f"--threads has {min(args.threads)}; expected at least 1")
    if args.dtype in ("bfloat16", "float16") and "powersgd" in args.baselines:
        args.baselines.remove("powersgd")  # its QR decomposition is for float32 and float64 only
    return args


def run_rank(rank: int, args: argparse.Namespace, store: str, arguments: list[str]) -> None:
    """One rank's whole run; rank 0 shows it."""
    torch.set_num_threads(args.threads[0])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    console = Console(quiet=rank > 0)
    if not console.is_terminal:
        console.width = 140  # a file has no edge to wrap at
    dtype = getattr(torch, args.dtype)
    shapes = squares(args.numel) if args.numel else MODELS[args.model]()
    workload = Workload(shapes, dtype, args.bucket_mb)
    small = Workload(SMALL, dtype)
    host = machine()

    model = "square matrices" if args.numel else args.model
    console.print(
        f"{model}: {len(shapes)} tensors, {workload.numel / 1e6:.1f} M {args.dtype} elements in "
        f"{len(workload.buckets)} buckets; {args.ranks} rank{'s' * (args.ranks > 1)}\n"
        f"{host['cpu']}, {host['cores']} cores, {host['isa']}; torch {host['torch']}"
    )
    verify(args, workload, small)
    console.print("Results verified. Timing.\n")
    results = compete(args, workload, console)
    console.print(legend(args))
    if args.json and rank == 0:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        command = ["python", "benchmarks/compare.py", *arguments]
        size = {"numel": workload.numel, "buckets": len(workload.buckets)}
        report = {
            "command": command,
            "machine": host,
            "settings": settings | size,
            "results": results,
        }
        report["load_average_at_end"] = os.getloadavg()
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def compete(args: argparse.Namespace, workload: Workload, console: Console) -> list[dict[str, Any]]:
    """All settings one after the other, each with a table; all rows."""
    settings = [
        {"threads": threads, "feedback": feedback, "ratio": ratio}
        for threads in args.threads
        for feedback in args.feedback
        for ratio in args.ratios
    ]
    results = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(settings) * (WARM_UP + args.repeat))
        for setting in settings:
            title = (
                f"{setting['feedback']}, ratio {setting['ratio']:g}, {setting['threads']} "
                f"thread{'s' * (setting['threads'] > 1)}"
            )
            progress.update(task, description=title)
            torch.set_num_threads(setting["threads"])
            stream = Stream(workload.numel) if args.ranks == 1 else None
            contestants = [
                make_contestant(
                    name, workload, setting["feedback"], setting["ratio"], args.columns, args.wire
                )
                for name in contestants_of(args, setting["feedback"])
            ]
            measure(args, workload, contestants, stream, lambda: progress.advance(task))
            rows = results_of(contestants, workload, setting)
            console.print(hook_table(rows, title) if args.ranks == 1 else ranks_table(rows, title))
            console.print()
            results += rows
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs in this process, or as many as there are ranks."""
    args = parse(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory() as folder:
        common = (args, f"{folder}/store", given)
        try:
            if args.ranks == 1:
                run_rank(0, *common)
            else:
                torch.multiprocessing.spawn(run_rank, common, nprocs=args.ranks)
        except WrongResultError as error:
            raise SystemExit(f"Wrong results, so nothing was timed. {error}") from None


if __name__ == "__main__":
    main()
