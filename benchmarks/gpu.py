"""What arc_topk costs on a GPU: against its floor, a Python hook and PowerSGD, in one run.

One rank, NCCL. DDP's buckets are filled and handed to each hook, all of them in flight at once as
after a backward pass; the clock, CUDA events around all of it, runs until the last future is
complete. Every hook whose equations are ours is verified before it is timed.

"ms" is that time, and "x_python" and "x_powersgd" compare it: what a hook costs where the GPU waits
for the host. "gpu_ms" is the same with the GPU kept busy until all is queued, as it is during a
backward pass, and "over_floor" compares it with floor.py's bytes at the bandwidth of a plain
streaming update of the same number of elements, measured in the same round. Collectives of one rank
are copies within the GPU: they are counted in, so that the ratio is an upper bound of what compute
costs. PowerSGD waits for the GPU by itself. Of fewer than ten million
elements it is None: there launches are what takes the time, and the cache holds what the floor
reads from memory.

"host_us_30" and "host_us_300" are the time on the CPU of one hook call, for a bucket of that many
tensors.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import make_contestant
from floor import floor_bytes
from torch import Tensor
from verification import verify_kept_rows
from workload import Workload, squares

WARM_UP = 4
MOST_BUCKETS = 16
LEAST_FOR_FLOOR = 10_000_000
CYCLES = 2e9  # a second's, about, of the GPU's clock
ENGINES = ("arc_topk", "rand_k", "top_k")
BASELINES = ("python", "powersgd")


def timed(work: Callable[[], Any], behind: float = 0.0) -> tuple[float, float]:
    """(GPU milliseconds, seconds on the host) of some work, the former by events.

    Args:
        work: queued on the current stream, or behind it.
        behind: seconds for which the GPU is given something to do first.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(behind * CYCLES))
    start.record()
    begin = time.perf_counter()
    work()
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def bandwidth(a: Tensor, b: Tensor, c: Tensor) -> float:
    """Bytes a second of c += a b."""
    return 4 * 4 * a.numel() / (1e-3 * timed(lambda: c.addcmul_(a, b), behind=1e-3)[0])


def verify(workload: Workload, feedback: str, ratio: float) -> None:
    """Raises `WrongResultError` where a hook to be timed is not what its equations say."""
    for name in (*ENGINES, "python"):
        fresh = make_contestant(name, workload, feedback, ratio)
        verify_kept_rows(fresh, workload, feedback, ratio)


def host_microseconds(tensors: int, device: str, calls: int = 50) -> float:
    """Median time on the CPU of a hook call, for one bucket of so many tensors.

    The device is idle at each call: a queue that is full is waited for by any launch.
    """
    shapes = [(64, 64) if i % 2 else (64,) for i in range(tensors)]
    workload = Workload(shapes, torch.float32, bucket_mb=1000, device=device)
    (bucket,) = workload.buckets
    contestant = make_contestant("arc_topk", workload, "ef21m", 0.1)
    times = []
    for step in range(WARM_UP + calls):
        workload.refill(step)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        future = contestant.hook(contestant.state, bucket)
        times.append(time.perf_counter() - start)
        future.wait()
    return 1e6 * statistics.median(times[WARM_UP:])


def require_nccl(name: str, metrics: dict[str, Any]) -> None:
    """Raises RuntimeError where an engine has timed collectives through the host's memory."""
    transport = metrics["transport"]
    if not transport.startswith("nccl"):
        raise RuntimeError(f"{name} exchanges by {transport!r}; expected NCCL: times would be its")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All hooks in turn, round after round; ratios are formed within a round."""
    dtype = getattr(torch, args.dtype)
    # Not so many buckets that their launches would not fit into the GPU's queue.
    bucket_mb = max(25, args.numel * dtype.itemsize / 1e6 / MOST_BUCKETS)
    workload = Workload(squares(args.numel), dtype, bucket_mb, device="cuda")
    verify(workload, args.feedback, args.ratio)
    names = (*ENGINES, *BASELINES)
    contestants = {n: make_contestant(n, workload, args.feedback, args.ratio) for n in names}
    arrays = [torch.full((workload.numel,), 1e-3, device="cuda") for _ in range(3)]
    times: dict[str, list[float]] = {name: [] for name in names}
    queued: dict[str, list[float]] = {name: [] for name in ENGINES}
    rates: list[float] = []
    peak = 0
    for step in range(WARM_UP + args.repeat):
        rates.append(bandwidth(*arrays))
        for name, contestant in contestants.items():
            exchange = functools.partial(contestant.exchange, workload.buckets, in_flight=True)
            workload.refill(step)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            milliseconds, host = timed(exchange)
            times[name].append(milliseconds)
            if name == "arc_topk" and step >= WARM_UP:
                peak = max(peak, torch.cuda.max_memory_allocated() - before)
            if name in ENGINES:
                workload.refill(step + 1)
                torch.cuda.synchronize()
                queued[name].append(timed(exchange, behind=2 * host)[0])
    engines = {name: contestants[name].state for name in ENGINES}
    for name, engine in engines.items():
        require_nccl(name, engine.metrics())

    def times_longer(name: str, than: str) -> float:
        pairs = zip(times[name][WARM_UP:], times[than][WARM_UP:], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def over_floor(name: str) -> float | None:
        if workload.numel < LEAST_FOR_FLOOR:
            return None
        moved = floor_bytes(engines[name].plan(), engines[name].config)
        pairs = zip(queued[name][WARM_UP:], rates[WARM_UP:], strict=True)
        return statistics.median(1e-3 * ms * rate / moved for ms, rate in pairs)

    return {
        "gpu": torch.cuda.get_device_name(),
        "numel": workload.numel,
        "dtype": args.dtype,
        "feedback": args.feedback,
        "ratio": args.ratio,
        "buckets": len(workload.buckets),
        "stream_GB_s": statistics.median(rates[WARM_UP:]) / 1e9,
        "ms": statistics.median(times["arc_topk"][WARM_UP:]),
        "gpu_ms": statistics.median(queued["arc_topk"][WARM_UP:]),
        "over_floor": over_floor("arc_topk"),
        "rand_k_over_floor": over_floor("rand_k"),
        "top_k_over_floor": over_floor("top_k"),
        "x_python": times_longer("python", than="arc_topk"),
        "x_powersgd": times_longer("powersgd", than="arc_topk"),
        "host_us_30": host_microseconds(30, "cuda"),
        "host_us_300": host_microseconds(300, "cuda"),
        "step_MB": peak / 1e6,
        "state_MB": engines["arc_topk"].plan().state_bytes / 1e6,
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
        print(f"{name:17} {value:.4g}" if isinstance(value, float) else f"{name:17} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
