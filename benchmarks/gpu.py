"""What arc_topk costs on a GPU: against its floor, a Python hook and PowerSGD, in one run.

One rank, NCCL. DDP's buckets are filled and handed to each hook, all of them in flight at once as
after a backward pass; the clock, CUDA events around all of it, runs until the last future is
complete. Collectives of one rank are copies within the GPU: they are counted in, so that the ratio
to the floor is an upper bound of what compute costs. The floor is floor.py's bytes at the bandwidth
of a plain streaming update of the same number of elements, measured between the rounds. "host_us"
is the time of a hook call on the CPU, per bucket.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from compare import make_contestant
from floor import floor_bytes
from torch import Tensor
from workload import Workload, squares

WARM_UP = 4


def milliseconds(work: Callable[[], Any]) -> float:
    """GPU time of some work, by events on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def bandwidth(a: Tensor, b: Tensor, c: Tensor) -> float:
    """Bytes a second of c += a b."""
    return 4 * 4 * a.numel() / (1e-3 * milliseconds(lambda: c.addcmul_(a, b)))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All hooks in turn, round after round."""
    dtype = getattr(torch, args.dtype)
    workload = Workload(squares(args.numel), dtype, device="cuda")
    names = ["arc_topk", "python", "powersgd"]
    if dtype != torch.float32:
        names.remove("powersgd")  # its QR decomposition is for float32 and float64 only
    contestants = {n: make_contestant(n, workload, args.feedback, args.ratio) for n in names}
    arrays = [torch.full((workload.numel,), 1e-3, device="cuda") for _ in range(3)]
    times: dict[str, list[float]] = {name: [] for name in names}
    host: list[float] = []
    rates: list[float] = []
    peak = 0
    for step in range(WARM_UP + args.repeat):
        rates.append(bandwidth(*arrays))
        for name, contestant in contestants.items():
            workload.refill(step)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            called = 0.0

            def exchange(contestant: Any = contestant) -> None:
                nonlocal called
                start = time.perf_counter()
                futures = [contestant.hook(contestant.state, b) for b in workload.buckets]
                called = time.perf_counter() - start
                for future in futures:
                    future.wait()

            times[name].append(milliseconds(exchange))
            if name == "arc_topk":
                host.append(1e6 * called / len(workload.buckets))
                if step >= WARM_UP:
                    peak = max(peak, torch.cuda.max_memory_allocated() - before)
    middle = {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}
    rate = statistics.median(rates[WARM_UP:])
    engine = contestants["arc_topk"].state
    plan = engine.plan()
    floor = 1e3 * floor_bytes(plan, engine.config) / rate
    return {
        "gpu": torch.cuda.get_device_name(),
        "numel": workload.numel,
        "dtype": args.dtype,
        "feedback": args.feedback,
        "ratio": args.ratio,
        "buckets": len(workload.buckets),
        "stream_GB_s": rate / 1e9,
        "floor_ms": floor,
        "ms": middle["arc_topk"],
        "over_floor": middle["arc_topk"] / floor,
        "x_python": middle["python"] / middle["arc_topk"],
        "x_powersgd": middle["powersgd"] / middle["arc_topk"] if "powersgd" in middle else None,
        "host_us": statistics.median(host[WARM_UP:]),
        "step_MB": peak / 1e6,
        "state_MB": plan.state_bytes / 1e6,
        "rounds": args.repeat,
    }


def main() -> None:
    """One size and dtype."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--numel", type=int, default=64_000_000, help="parameters; default 64 M")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--feedback", choices=("none", "ef14", "ef21", "ef21m"), default="ef21m")
    p.add_argument("--ratio", type=float, default=0.1, help="kept share of rows; default 0.1")
    p.add_argument("--repeat", type=int, default=10, help="timed rounds; default 10")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = p.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a GPU, and torch finds none")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        result = measure(args)
        dist.destroy_process_group()
    for name, value in result.items():
        print(f"{name:12} {value:.4g}" if isinstance(value, float) else f"{name:12} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
