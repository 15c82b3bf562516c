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
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from floor import Stream, floor_bytes
from python_hook import PythonArcTopK, python_arc_topk_hook
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from workload import MODELS, Shapes, Workload, split, squares

import arc_topk
from arc_topk.plan import make_plan
from arc_topk.reference import Oracle

Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[Any]]

COMPRESSORS = ("arc_topk", "rand_k", "top_k", "dense")
BASELINES = ("python", "powersgd")
COMPUTE = ("prepare", "select", "pack", "apply")  # phases that are not collectives
POWERSGD_RANK = 4
# EF21's dense step, PowerSGD's two, and in the third everything is allocated.
WARM_UP = 3
# Small enough for the oracle: matrices, a vector, a convolution.
SMALL: Shapes = [(48, 24), (24,), (30, 40), (8, 6, 3, 3)]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 4e-2, torch.float16: 1e-2}


class WrongResultError(RuntimeError):
    """A hook's averages are not what its equations say."""


# --- who takes part -------------------------------------------------------------------------------


@dataclass
class Contestant:
    """A hook with its state, and what was measured of it, a number a round.

    Attributes:
        name: a compressor's, a baseline's, or "DDP".
        hook, state: as for ``DistributedDataParallel.register_comm_hook``.
        seconds: from the first bucket's hook call to the last completed future.
        compute: those without the collectives; empty where it is not known.
        phases: `arc_topk.State.metrics`'s seconds.
        bandwidth: of the streaming update just before; empty with several ranks.
    """

    name: str
    hook: Hook
    state: Any
    seconds: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)

    def exchange(self, buckets: Sequence[dist.GradBucket], in_flight: bool) -> list[Tensor]:
        """Averages all buckets, together if ``in_flight``, else one after the other."""
        if not in_flight:
            return [tensor_of(self.hook(self.state, bucket).wait()) for bucket in buckets]
        futures = [self.hook(self.state, bucket) for bucket in buckets]
        return [tensor_of(future.wait()) for future in futures]


def tensor_of(value: Any) -> Tensor:
    """A hook's future holds a tensor or a list of one."""
    tensor: Tensor = value[0] if isinstance(value, (list, tuple)) else value
    return tensor


def make_contestant(name: str, workload: Workload, feedback: str, ratio: float) -> Contestant:
    """The hook called ``name``, without any state yet."""
    if name == "DDP":
        return Contestant(name, allreduce_hook, dist.group.WORLD)
    if name == "python":
        return Contestant(name, python_arc_topk_hook, PythonArcTopK(ratio, feedback))
    if name == "powersgd":
        # Only on one rank: it issues collectives from callbacks, which may run in another order on
        # another rank, and Gloo, which pairs collectives by order, then aborts.
        state = PowerSGDState(
            dist.group.WORLD, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=2
        )
        return Contestant(name, powerSGD_hook, state)
    # Dense stands for plain averaging, whatever the others remember.
    config = arc_topk.Config(
        compressor=name, feedback="none" if name == "dense" else feedback, ratio=ratio
    )
    return Contestant(name, arc_topk.arc_topk_hook, arc_topk.State(config).bind(workload.ddp))


# --- verification ---------------------------------------------------------------------------------


def verify_against_oracle(contestant: Contestant, workload: Workload, steps: int = 4) -> None:
    """Compares a fresh hook of arc_topk with the package's plain torch oracle, on a small workload.

    Raises:
        WrongResultError: they differ; names contestant, step and tensor.
    """
    config = contestant.state.config
    parameters = [p for bucket in workload.buckets for p in bucket.parameters()]
    dtype, ranks = parameters[0].dtype, dist.get_world_size()
    oracle = Oracle(
        parameters,
        dtype,
        ranks,
        compressor=config.compressor,
        feedback=config.feedback,
        ratio=config.ratio,
    )
    gradients = [workload.gradients(rank) for rank in range(ranks)]
    for step in range(steps):
        workload.refill(step)
        outputs = split_all(workload, contestant.exchange(workload.buckets, in_flight=False))
        now = [split_all(workload, own[step % len(own)]) for own in gradients]
        for t, (output, result) in enumerate(zip(outputs, oracle.step(now), strict=True)):
            place = f"step {step}, tensor {t} of shape {tuple(output.shape)}"
            size = sum((own[t].double().abs() for own in now), result.output.double().abs())
            require_close(contestant, place, output, result.output, size)


def verify_kept_rows(
    contestant: Contestant, workload: Workload, feedback: str, ratio: float
) -> None:
    """Checks a fresh hook's first compressed step, at any size: K rows, and the right values.

    With h the result before (EF21, EF21M: the mean gradient; else 0), each row is either still h or
    h + eta (mean g - h), where eta is 1 but for EF21M; K rows are the latter.

    Raises:
        WrongResultError: a result is anything else; names contestant and tensor.
    """
    has_estimate = feedback in ("ef21", "ef21m")
    eta = 0.1 if feedback == "ef21m" else 1.0
    before = [torch.zeros_like(b.buffer()) for b in workload.buckets]
    if has_estimate:
        workload.refill(0)
        before = [t.clone() for t in contestant.exchange(workload.buckets, in_flight=False)]
        for flat, mean in zip(before, workload.mean_gradient(0), strict=True):
            require_close(contestant, "the dense first step", flat, mean)
    step = int(has_estimate)
    workload.refill(step)
    outputs = split_all(workload, contestant.exchange(workload.buckets, in_flight=False))
    olds = split_all(workload, before)
    means = split_all(workload, workload.mean_gradient(step))
    exact = outputs[0].dtype in (torch.float32, torch.float64)  # else a step may be rounded away
    for t, (out, old, g) in enumerate(zip(outputs, olds, means, strict=True)):
        place = f"tensor {t} of shape {tuple(out.shape)}"
        message = eta * (g.double() - old.double())
        sent, size = old.double() + message, old.double().abs() + message.abs()
        view = kept_of(contestant, out, ratio)
        if view is None:  # dense: the Python hook takes the mean as it is
            require_close(contestant, place, out, g if contestant.name == "python" else sent, size)
            continue
        m, k = view
        changed = (out != old).view(m, -1).any(dim=1)
        number = int(changed.sum())
        if number > k or (exact and number < k):
            raise WrongResultError(f"{contestant.name}, {place}: {number} rows were sent, not {k}")
        rows = [t.view(m, -1)[changed] for t in (out, sent, size)]
        require_close(contestant, place, *rows)


def kept_of(contestant: Contestant, tensor: Tensor, ratio: float) -> tuple[int, int] | None:
    """(m, K) of a tensor; None where it stays dense."""
    if contestant.name == "python":
        m = len(tensor)
        return (m, math.ceil(ratio * m * (1 - 1e-12))) if tensor.dim() > 1 else None
    config = contestant.state.config
    row = make_plan(config, [("", tensor)], dist.get_world_size()).rows[0]
    return None if row.view is None or row.kept is None else (row.view[0], row.kept)


def require_close(
    contestant: Contestant, place: str, got: Tensor, expected: Tensor, size: Tensor | None = None
) -> None:
    """Raises WrongResultError where two tensors differ by more than rounding.

    Args:
        contestant: named in the error.
        place: named in the error.
        got: the hook's.
        expected: of the same shape.
        size: of the numbers that were rounded on the way; None: that of ``expected``.
    """
    wide = expected.double()
    allowed = TOLERANCE[got.dtype] * (1 + (wide if size is None else size).abs())
    difference = (got.double() - wide).abs()
    wrong = ~(difference <= allowed)  # NaN is wrong too
    if wrong.any():
        raise WrongResultError(
            f"{contestant.name}, {place}: {int(wrong.sum())} of {got.numel()} elements are wrong, "
            f"by up to {float(difference[wrong].max()):.3g}"
        )


def split_all(workload: Workload, flats: Sequence[Tensor]) -> list[Tensor]:
    """Of all buckets' tensors the parameters' views."""
    pairs = zip(workload.buckets, flats, strict=True)
    return [view for bucket, flat in pairs for view in split(bucket, flat)]


def verify(args: argparse.Namespace, workload: Workload, small: Workload) -> None:
    """Verifies every hook that will be timed: against the oracle, and (one rank) at full size."""
    sized = workload if args.ranks == 1 else small
    for feedback in args.feedback:
        for ratio in args.ratios:
            for name in contestants_of(args, verified=True):
                fresh = make_contestant(name, small, feedback, ratio)
                if name != "python":
                    verify_against_oracle(fresh, small)
                # Top-K's ranks keep elements of their own, so that no K rows stand out; dense all.
                if name == "dense" or (name == "top_k" and args.ranks > 1):
                    continue
                fresh = make_contestant(name, sized, feedback, ratio)
                verify_kept_rows(fresh, sized, feedback, ratio)


# --- timing ---------------------------------------------------------------------------------------


def contestants_of(args: argparse.Namespace, verified: bool = False) -> list[str]:
    """Names in the order in which they take turns; ``verified``: without those of torch's own."""
    names = [*args.compressors, *args.baselines]
    if args.ranks > 1:
        names = ["DDP", *(name for name in names if name != "powersgd")]
    return [n for n in names if n not in ("DDP", "powersgd")] if verified else names


def measure(
    args: argparse.Namespace,
    workload: Workload,
    contestants: list[Contestant],
    stream: Stream | None,
    advance: Callable[[], None],
) -> None:
    """Times all contestants in turn, ``args.repeat`` rounds after the warm-up."""
    for step in range(WARM_UP + args.repeat):
        for contestant in contestants:
            is_engine = isinstance(contestant.state, arc_topk.State)
            workload.refill(step)
            bandwidth = stream.bandwidth() if stream else None
            if is_engine:
                contestant.state.reset_metrics()
            dist.barrier()
            start = time.perf_counter()
            contestant.exchange(workload.buckets, in_flight=args.ranks > 1)
            seconds = slowest(time.perf_counter() - start)
            if step < WARM_UP:
                continue
            contestant.seconds.append(seconds)
            if bandwidth is not None:
                contestant.bandwidth.append(bandwidth)
            if is_engine and contestant.name != "dense":
                phases = contestant.state.metrics()["seconds"]
                contestant.phases.append(phases)
                contestant.compute.append(sum(phases[phase] for phase in COMPUTE))
        advance()


def slowest(seconds: float) -> float:
    """The longest time that any rank took."""
    if dist.get_world_size() == 1:
        return seconds
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def spread(values: Sequence[float], scale: float = 1) -> dict[str, Any] | None:
    """Median, least and largest, and the values themselves; None of nothing."""
    if not values:
        return None
    scaled = [scale * v for v in values]
    middle = statistics.median(scaled)
    return {"median": middle, "min": min(scaled), "max": max(scaled), "rounds": scaled}


def results_of(
    contestants: list[Contestant], workload: Workload, setting: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row a contestant, as it goes into table and JSON."""
    by_name = {c.name: c for c in contestants}
    rows = []
    for c in contestants:
        row = {**setting, "hook": c.name, "ms": spread(c.seconds, 1e3)}
        row["compute_ms"] = spread(c.compute, 1e3)
        for phase in c.phases[0] if c.phases else ():
            row.setdefault("phases_ms", {})[phase] = 1e3 * statistics.median(
                phases[phase] for phases in c.phases
            )
        for name in ("python", "powersgd", "DDP"):
            if name in by_name and name != c.name:
                pairs = zip(by_name[name].seconds, c.seconds, strict=True)
                row[f"times_faster_than_{name}"] = spread([other / own for other, own in pairs])
        if isinstance(c.state, arc_topk.State):
            plan = c.state.plan()
            row["wire_bytes"], row["dense_bytes"] = plan.wire_bytes, plan.dense_bytes
            row["state_bytes"] = plan.state_bytes
            if c.compute and c.bandwidth:
                least = floor_bytes(plan, c.state.config)
                floors = [least / bandwidth for bandwidth in c.bandwidth]
                row["floor_bytes"], row["floor_ms"] = least, spread(floors, 1e3)
                pairs = zip(c.compute, floors, strict=True)
                row["over_floor"] = spread([compute / floor for compute, floor in pairs])
        rows.append(row)
    streams = [4 * 4 * workload.numel / b for c in contestants for b in c.bandwidth]
    if streams:
        rows.insert(0, {**setting, "hook": "stream", "ms": spread(streams, 1e3)})
    return rows


# --- output ---------------------------------------------------------------------------------------


def median(value: dict[str, Any] | None, digits: int = 1) -> str:
    """A spread's median as text."""
    return "" if value is None else f"{value['median']:.{digits}f}"


def with_range(value: dict[str, Any] | None, digits: int = 1) -> str:
    """A spread as "median (least-largest)"."""
    if value is None:
        return ""
    return f"{median(value, digits)} ({value['min']:.{digits}f}-{value['max']:.{digits}f})"


def hook_table(rows: list[dict[str, Any]], title: str) -> Table:
    """The cost of the hook alone, for one setting of threads, feedback and ratio."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("hook")
    columns = ["ms (min-max)", *COMPUTE, "compute", "floor", "x floor (min-max)"]
    for column in [*columns, "x python", "x powersgd", "bytes"]:
        table.add_column(column, justify="right")
    for row in rows:
        phases = row.get("phases_ms", {})
        table.add_row(
            row["hook"],
            with_range(row["ms"]),
            *[f"{phases[phase]:.1f}" if phases else "" for phase in COMPUTE],
            median(row.get("compute_ms")),
            median(row.get("floor_ms")),
            with_range(row.get("over_floor"), 2),
            median(row.get("times_faster_than_python")),
            median(row.get("times_faster_than_powersgd")),
            share_of_bytes(row),
        )
    return table


def ranks_table(rows: list[dict[str, Any]], title: str) -> Table:
    """The whole exchange over several ranks, for one setting."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("hook")
    for column in ("ms (min-max)", "x DDP (min-max)", "compute", "collectives", "bytes"):
        table.add_column(column, justify="right")
    for row in rows:
        phases = row.get("phases_ms", {})
        collectives = [v for phase, v in phases.items() if phase not in COMPUTE]
        table.add_row(
            row["hook"],
            with_range(row["ms"]),
            with_range(row.get("times_faster_than_DDP"), 2),
            median(row.get("compute_ms")),
            f"{sum(collectives):.1f}" if phases else "",
            share_of_bytes(row),
        )
    return table


def share_of_bytes(row: dict[str, Any]) -> str:
    """What is handed to the collectives, relative to plain averaging."""
    return f"{100 * row['wire_bytes'] / row['dense_bytes']:.1f} %" if "wire_bytes" in row else ""


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the settings."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "isa": arc_topk._C.cpu_isa(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "arc_topk": arc_topk.__version__,
    }


def legend(args: argparse.Namespace) -> str:
    """What the columns mean, in a few lines under the tables."""
    if args.ranks > 1:
        return (
            "ms: all buckets in flight together, slowest rank, median of the rounds. x DDP: how\n"
            "many times faster than DDP's own all-reduce. compute, collectives: over buckets.\n"
            "bytes: handed to the collectives, of those of plain averaging."
        )
    return (
        "ms: from each hook call to its completed future, summed over buckets; median of rounds.\n"
        "compute: its phases without the collectives. floor: the least bytes the equations allow,\n"
        "at the bandwidth of `stream` (c += a b, as many float32 elements). x python, x powersgd:\n"
        "how many times faster than those. bytes: handed to the collectives, of those of plain\n"
        "averaging."
    )


# --- command line ---------------------------------------------------------------------------------

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
        help=f"python: ARC-Top-K of torch operations; powersgd: torch's, rank {POWERSGD_RANK}, one "
        "rank only. Give none to leave both out",
    )
    p.add_argument(
        "--threads", type=int, nargs="+", help=f"of torch, a rank; default {[1, 2][:cores]}, or 1"
    )
    p.add_argument("--ranks", type=int, default=1, help="more than 1: time the whole exchange")
    p.add_argument("--repeat", type=int, default=7, help="timed rounds; default 7")
    p.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32"
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
    for name in ("numel", "ranks", "repeat"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name} is {value}; expected at least 1")
    for ratio in args.ratios:
        if not 0 < ratio <= 1:
            p.error(f"--ratios has {ratio}; expected shares in (0, 1]")
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
                make_contestant(name, workload, setting["feedback"], setting["ratio"])
                for name in contestants_of(args)
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
