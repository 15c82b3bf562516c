"""A long run with everything at once, watched from outside: `make soak`.

For each error feedback, in natural rows and in rows of eight: a model of several buckets trains on
two ranks, with random accumulation, with parameters that a rank leaves out, with DDP's buckets
rebuilt in every other life, and a checkpoint, a new DDP and a new State at each life's end. All
along ranks must hold the same parameters, h must be the mean of the h_i, and memory, threads and
files must stay.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import os
import random
import resource
import sys
import tempfile
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import RankError, temporary
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk

SETTINGS = [
    {"feedback": feedback, "row_width": row_width}
    for feedback in ("none", "ef14", "ef21", "ef21m")
    for row_width in (None, 8)
]
LIVES = 10
LOOK_EVERY = 100
DRIFT = 1e-5  # |h - mean h_i| over |h|
GROWTH = 8.0  # MB, from the first third's end on


class Branches(nn.Module):
    """Six branches of two layers; a forward may leave some out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 9)) for _ in range(6)
        )

    def forward(self, inputs: Tensor, used: list[int]) -> Tensor:
        return torch.stack([self.branches[i](inputs) for i in used]).mean(0)


@dataclass
class Watch:
    """What is seen from outside at a life's end."""

    memory_mb: float
    threads: int
    files: int


@dataclass
class Outcome:
    """Of one setting, on one rank."""

    complaint: str = ""
    drift: float = 0.0
    buckets: int = 0
    first: Watch | None = None  # after a third of the lives
    last: Watch | None = None


def watch() -> Watch:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tasks, files = os.listdir("/proc/self/task"), os.listdir("/proc/self/fd")
    return Watch(pages * resource.getpagesize() / 1e6, len(tasks), len(files))


def same_parameters(model: nn.Module) -> bool:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    return len(set(digests)) == 1


def drift(state: arc_topk.State) -> float:
    """The largest |h - mean h_i| / |h| of any parameter; 0 where nothing is shared."""
    saved = state.state_dict(gather=False)
    (own,) = saved["own"].values()
    h_i = "a" if state.config.feedback == "ef21" else "b"
    largest = 0.0
    for name, h in saved["shared"].items():
        if name not in own:
            continue  # it stays dense: its estimate is the mean itself
        mean = own[name][h_i] / dist.get_world_size()
        dist.all_reduce(mean)
        largest = max(largest, ((h - mean).norm() / h.norm().clamp_min(1e-30)).item())
    return largest


def live(
    rank: int, world_size: int, steps: int, config: dict[str, Any], folder: str, seed: int
) -> Outcome:
    """One setting, all of its lives."""
    together, alone = random.Random(seed), random.Random(seed + 1 + rank)
    model = Branches()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, weight_decay=1e-3)
    outcome = Outcome()
    saved: dict[str, Any] | None = None
    step = 0
    for number in range(LIVES):
        leaves_out = number % 2 == 0  # else DDP rebuilds its buckets
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.005, find_unused_parameters=leaves_out)
        state = arc_topk.register(ddp, ratio=0.25, **config)
        if number % 4 == 1:
            state.load(folder)
        elif saved is not None:
            state.load_state_dict(saved)
        exchanged = 0
        while step < steps * (number + 1) // LIVES:
            step += 1
            used = [i for i in range(6) if not leaves_out or alone.random() < 0.7]
            accumulates = together.random() < 0.2
            with ddp.no_sync() if accumulates else contextlib.nullcontext():
                generator = torch.Generator().manual_seed(seed + 1000 * step + rank)
                inputs = torch.randn(4, 24, generator=generator)
                (ddp(inputs, used or [0]) - inputs[:, :9]).square().mean().backward()
            if not accumulates:
                optimizer.step()
                optimizer.zero_grad()
                exchanged += 1
            if step % LOOK_EVERY == 0 or step == steps:
                outcome.complaint = look(step, model, state, outcome)
                if outcome.complaint:
                    return outcome
        outcome.buckets = max(outcome.buckets, state.metrics()["exchanges"] // max(1, exchanged))
        if number % 4 == 0:
            state.save(folder)
        saved = state.state_dict(gather=False)
        optimizer.zero_grad()
        del ddp, state
        outcome.last = watch()
        if number == LIVES // 3:
            outcome.first = outcome.last
    outcome.complaint = growth(outcome)
    return outcome


def look(step: int, model: nn.Module, state: arc_topk.State, outcome: Outcome) -> str:
    """What is wrong after a step."""
    if not same_parameters(model):
        return f"after {step} steps ranks hold other parameters"
    outcome.drift = max(outcome.drift, drift(state))
    if outcome.drift > DRIFT:
        return f"after {step} steps |h - mean h_i| / |h| is {outcome.drift:.1e}"
    if not all(p.isfinite().all() for p in model.parameters()):
        return f"after {step} steps parameters are not finite"
    return ""


def growth(outcome: Outcome) -> str:
    """What has not stayed."""
    first, last = outcome.first, outcome.last
    assert first is not None and last is not None
    if outcome.buckets < 5:
        return f"there are {outcome.buckets} buckets; expected 5 or more"
    if last.memory_mb > first.memory_mb + GROWTH:
        return f"memory grew from {first.memory_mb:.1f} to {last.memory_mb:.1f} MB"
    if (last.threads, last.files) != (first.threads, first.files):
        return f"threads and files went from {first} to {last}"
    return ""


def soak(steps: int, seed: int, console: Console) -> list[str]:
    """Runs all settings; the complaints."""
    table = Table(box=None, pad_edge=False)
    for name in ("feedback", "rows", "steps", "buckets", "drift", "MB", "threads", "files"):
        table.add_column(name, justify="left" if name in ("feedback", "rows") else "right")
    complaints = []
    with temporary(2, timedelta(minutes=10)) as pool, Progress(console=console) as progress:
        task = progress.add_task("soak", total=len(SETTINGS))
        for config in SETTINGS:
            rows = "natural" if config["row_width"] is None else str(config["row_width"])
            progress.update(task, description=f"{config['feedback']}, rows {rows}")
            with tempfile.TemporaryDirectory() as folder:
                runs: list[Outcome] = pool.run(live, steps, config, folder, seed)
            for rank, run in enumerate(runs):
                if run.complaint:
                    complaints.append(f"{config}, rank {rank}: {run.complaint}")
            a, b = runs[0].first or Watch(0, 0, 0), runs[0].last or Watch(0, 0, 0)
            watched = [f"{x:.0f} -> {y:.0f}" for x, y in zip(astuple(a), astuple(b), strict=True)]
            numbers = f"{steps:,}", str(runs[0].buckets), f"{runs[0].drift:.1e}"
            table.add_row(str(config["feedback"]), rows, *numbers, *watched)
            progress.advance(task)
    console.print(table)
    return complaints


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--steps", type=int, default=10_000, help="of each setting (default %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0, help="of data and chances (default %(default)s)")
    options = p.parse_args()
    if options.steps < LIVES:
        p.error(f"--steps is {options.steps}; expected at least {LIVES}, one a life")
    try:
        complaints = soak(options.steps, options.seed, Console())
    except RankError as error:
        complaints = [str(error)]
    for complaint in complaints:
        print(f"FAILED: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
