"""What each rank of `step_time.py` does: whole steps of every method in turn, round after round."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from contestants import Contestant
from llama import SIZES, Llama, shapes
from python_hook import PythonArcTopK, python_arc_topk_hook
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from verification import SMALL, verify_against_oracle
from workload import Workload

import arc_topk

WARM_UP = 3  # EF21's dense step, PowerSGD's two, DDP's new buckets
TRIALS = 9  # adaptive's seven, and DDP's new buckets
INTERFACE = "eth0"
ONE_BUCKET_MB = 100_000
# Fields of arc_topk.Config, without ratio.
ENGINE: dict[str, dict[str, Any]] = {
    "arc_topk": {"wire_dtype": torch.float32},
    "arc_topk_bf16": {"wire_dtype": torch.bfloat16, "sketch_dtype": torch.bfloat16},
    "arc_topk_uint8": {"wire_dtype": torch.uint8, "sketch_dtype": torch.bfloat16},
    "adaptive": {"adaptive": True, "wire_dtype": torch.float32},
    "adaptive_uint8": {"adaptive": True, "wire_dtype": torch.uint8, "sketch_dtype": torch.bfloat16},
    "engine_dense": {"compressor": "dense", "feedback": "none"},
    "arc_topk_ef21m": {"feedback": "ef21m"},
    "low_rank": {"compressor": "low_rank", "rank": 4, "wire_dtype": torch.float32},
    "low_rank_uint8": {"compressor": "low_rank", "rank": 4, "wire_dtype": torch.uint8},
    "low_rank_bytes": {"compressor": "low_rank", "wire_dtype": torch.uint8},
    "rand_k": {"compressor": "rand_k"},
    "top_k": {"compressor": "top_k"},
}
TORCH = ("dense", "bf16_hook", "powersgd", "python")
METHODS = (*TORCH, *ENGINE)


def config_of(method: str, ratio: float) -> arc_topk.Config:
    """The engine's, of one of its methods."""
    return arc_topk.Config(ratio=ratio, **ENGINE[method])


def hook_of(method: str, ratio: float, ddp: DistributedDataParallel) -> Contestant:
    """A method's hook with its state, bound to ``ddp`` where it is the engine's."""
    if method == "dense":
        return Contestant(method, allreduce_hook, dist.group.WORLD)
    if method == "bf16_hook":
        return Contestant(method, bf16_compress_hook, dist.group.WORLD)
    if method == "python":
        return Contestant(method, python_arc_topk_hook, PythonArcTopK(ratio, "ef14"))
    if method == "powersgd":
        state = PowerSGDState(dist.group.WORLD, matrix_approximation_rank=4, start_powerSGD_iter=2)
        return Contestant(method, powerSGD_hook, state)
    return engine_hook(method, config_of(method, ratio), ddp)


def engine_hook(method: str, config: arc_topk.Config, ddp: DistributedDataParallel) -> Contestant:
    """The engine's hook, in its standard form."""
    return Contestant(method, arc_topk.arc_topk_hook, arc_topk.State(config).bind(ddp))


class Stepper(Protocol):
    """One method's step.

    Attributes:
        hook: with its state.
        bucket_mb: DDP's.
    """

    hook: Contestant
    bucket_mb: float

    def prepare(self, number: int) -> None:
        """What is not timed."""

    def step(self) -> None:
        """What is."""


class Replayed:
    """Buckets become ready over a while in which the processor is idle, as beside a GPU."""

    def __init__(self, hook: Contestant, workload: Workload, seconds: float, mb: float) -> None:
        self.hook, self.bucket_mb = hook, mb
        self._workload, self._seconds = workload, seconds
        sizes = [bucket.buffer().numel() for bucket in workload.buckets]
        self._ready = [sum(sizes[: i + 1]) / sum(sizes) for i in range(len(sizes))]

    def prepare(self, number: int) -> None:
        """The step's gradients into DDP's buckets."""
        self._workload.refill(number)

    def step(self) -> None:
        """From the beginning of backward to the last averaged bucket."""
        begin = time.perf_counter()
        futures = []
        for share, bucket in zip(self._ready, self._workload.buckets, strict=True):
            time.sleep(max(0.0, begin + share * self._seconds - time.perf_counter()))
            futures.append(self.hook.hook(self.hook.state, bucket))
        for future in futures:
            future.wait()


class Trained:
    """Forward, backward and an SGD step of a model of its own."""

    def __init__(self, method: str, ratio: float, model: str, tokens: int, mb: float) -> None:
        torch.manual_seed(0)
        self.bucket_mb = mb
        network = Llama(SIZES[model])
        self._ddp = DistributedDataParallel(network, bucket_cap_mb=mb)
        self._local = method == "local"
        if method in ENGINE:
            state = arc_topk.register(self._ddp, config_of(method, ratio))
            self.hook = Contestant(method, arc_topk.arc_topk_hook, state)
        elif self._local:
            self.hook = Contestant(method, allreduce_hook, None)
        else:
            self.hook = hook_of(method, ratio, self._ddp)
            if method != "dense":  # DDP's own averaging is no hook
                self._ddp.register_comm_hook(self.hook.state, self.hook.hook)
        self._optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        self._tokens = torch.zeros(1, tokens + 1, dtype=torch.long)

    def prepare(self, number: int) -> None:
        """Other tokens."""
        chance = torch.Generator().manual_seed(1000 * number + dist.get_rank())
        self._tokens.random_(0, 256, generator=chance)

    def step(self) -> None:
        """One step of training."""
        self._optimizer.zero_grad()
        with self._ddp.no_sync() if self._local else contextlib.nullcontext():
            self._ddp(self._tokens).backward()
        self._optimizer.step()


def sent_bytes() -> int:
    """What this rank has sent over its link, headers and all; 0 without a lab."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.strip().partition(":")
        if name == INTERFACE:
            return int(numbers.split()[8])
    return 0


def over_ranks(value: float, op: Any) -> float:
    """Reduced over all of them."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return float(tensor)


def warm_up_of(stepper: Stepper) -> int:
    """Steps until a method does what it will go on doing."""
    state = stepper.hook.state
    return TRIALS if isinstance(state, arc_topk.State) and state.config.adaptive else WARM_UP


def timed(stepper: Stepper, row: dict[str, Any]) -> None:
    """One step, with what it took and sent."""
    state = stepper.hook.state
    if isinstance(state, arc_topk.State):
        state.reset_metrics()
    dist.barrier()
    sent, cpu, begin = sent_bytes(), time.process_time(), time.perf_counter()
    stepper.step()
    seconds = time.perf_counter() - begin
    cpu = time.process_time() - cpu
    row["ms"].append(1e3 * over_ranks(seconds, dist.ReduceOp.MAX))
    row["cpu_ms"].append(1e3 * over_ranks(cpu, dist.ReduceOp.SUM))
    row["sent"].append(sent_bytes() - sent)  # only now all of it has left
    if isinstance(state, arc_topk.State):
        metrics = state.metrics()
        row["link_bytes"] = metrics["link_bytes"]
        phases = {phase: 1e3 * value for phase, value in metrics["seconds"].items()}
        row.setdefault("phases_ms", []).append(phases)
        if state.config.adaptive:
            row["notes"] = list(state.plan().notes)


def measure(
    steppers: list[Stepper], rounds: int, advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All of them in turn, so that a slow moment falls on all: a row each."""
    rows: list[dict[str, Any]] = [
        {"method": s.hook.name, "bucket_mb": s.bucket_mb, "ms": [], "sent": [], "cpu_ms": []}
        for s in steppers
    ]
    for stepper in steppers:
        for number in range(warm_up_of(stepper)):
            stepper.prepare(number)
            stepper.step()
    for number in range(rounds):
        for stepper, row in zip(steppers, rows, strict=True):
            stepper.prepare(number)
            timed(stepper, row)
            advance(stepper.hook.name)
    return rows


def link_bytes(method: str, numel: int) -> float | None:
    """What a ring sends for plain averaging, in float32 or bfloat16."""
    share = 2 * (dist.get_world_size() - 1) / dist.get_world_size()
    return {"dense": 4 * numel * share, "bf16_hook": 2 * numel * share}.get(method)


def verify(methods: list[str], ratio: float) -> None:
    """Every engine's method against the plain oracle, on small shapes and these ranks.

    With sketches in float32: what a ring sums in bfloat16 depends on its order, and with it which
    rows are picked and in which units.
    """
    small = Workload(SMALL, torch.float32)
    for method in methods:
        if method in ENGINE:
            config = config_of(method, max(ratio, 0.1))
            config = dataclasses.replace(config, sketch_dtype=None, adaptive=False)
            verify_against_oracle(engine_hook(method, config, small.ddp), small)


def cell(settings: dict[str, Any], replay: float | None, ratio: float, advance: Any) -> list[Any]:
    """The rows of one replayed time, or of real training, and one ratio."""
    steppers: list[Stepper] = []
    size = SIZES[settings["model"]]
    workloads = {mb: Workload(shapes(size), torch.float32, mb) for mb in settings["bucket_mb"]}
    methods = settings["methods"] if replay is not None else ["local", *settings["methods"]]
    for method in methods:
        sizes = settings["bucket_mb"]
        if method not in ("dense", "bf16_hook"):
            sizes = sizes[:1]
        if method == "powersgd":
            sizes = [ONE_BUCKET_MB]  # over several its collectives cross, and Gloo aborts
            workloads[ONE_BUCKET_MB] = Workload(shapes(size), torch.float32, ONE_BUCKET_MB)
        for mb in sizes:
            if replay is None:
                steppers.append(Trained(method, ratio, settings["model"], settings["tokens"], mb))
            else:
                hook = hook_of(method, ratio, workloads[mb].ddp)
                steppers.append(Replayed(hook, workloads[mb], replay, mb))
    rows = measure(steppers, settings["rounds"], advance)
    numel = workloads[settings["bucket_mb"][0]].numel
    for row in rows:
        row.update(replay_s=replay, ratio=ratio, numel=numel)
        row.setdefault("link_bytes", link_bytes(row["method"], numel))
    return rows


def main() -> None:
    """One rank, as netlab starts it: ``step_rank.py SETTINGS OUTPUT``, both JSON files."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    dist.init_process_group("gloo")
    cells = [(replay, ratio) for replay in settings["replay_s"] for ratio in settings["ratios"]]
    console = Console(quiet=dist.get_rank() > 0, stderr=True)
    verify(settings["methods"], settings["ratios"][0])
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cells) * settings["rounds"])

        def advance(name: str) -> None:
            progress.update(task, description=f"{settings['label']}: {name}")

        for replay, ratio in cells:
            rows += cell(settings, replay, ratio, advance)
            progress.advance(task, settings["rounds"])
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
