"""What gradient clipping does to compressed training, and what a spike of one rank does.

A perceptron learns a random teacher's classes from four ranks in this process: the oracle of the
tests (arc_topk.reference) stands for the engine, so nothing here is fast, and no process group is
needed. Each way is trained with several seeds, once as it is and once with a spike: in one step,
half-way, the gradient of rank 0 is so many times as long.

  after        clip_grad_norm_ behind the exchange, as in plain DDP
  spike limit  Config.spike_limit, before the message, and then clip_grad_norm_
  given back   clip_grad_norm_, and what it cut off goes back into the residual (EF14); the engine
               has no such thing: docs/clipping.md

Limits are given as multiples of the median gradient norm of dense training without clipping; those
called "own norm" of the median norm of what the exchange itself hands out without clipping.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from arc_topk.reference import Oracle

EXAMPLES = """\
examples:
  python benchmarks/clipping.py                      about three minutes on one core; Ctrl-C
                                                     shows the table as far as it is
  python benchmarks/clipping.py --optimizer adamw    steps that do not scale with the gradient
  python benchmarks/clipping.py --feedbacks ef14 --limits 1 --spike-limits 2 3 5 10
                                                     which spike limit
  python benchmarks/clipping.py --steps 40 --seeds 1 a quick look
"""
RANKS = 4
BATCH = 16
WARM_UP = 20
# Learning rate, and further settings: the best of a few tried for each, without clipping.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 1.0}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.5, 0.99)}),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--optimizer", choices=OPTIMIZERS, default="sgd")
    add("--feedbacks", nargs="+", choices=("ef14", "ef21m"), default=["ef14", "ef21m"])
    add("--ratio", type=float, default=0.1, help="kept share of rows (default %(default)s)")
    add("--limits", type=float, nargs="*", default=[0.3, 1.0],
        help="of clip_grad_norm_, times the usual norm (default 0.3 1); no clipping is always "
        "measured")  # fmt: skip
    add("--spike-limits", type=float, nargs="+", default=[3.0],
        help="values of Config.spike_limit (default 3)")  # fmt: skip
    add("--spike", type=float, default=100.0, help="how many times as long (default %(default)s)")
    add("--steps", type=int, default=150, help="of a run (default %(default)s)")
    add("--seeds", type=int, default=3, help="runs of each way (default %(default)s)")
    return p


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    feedback: str | None = None  # None: dense
    limit: float = math.inf  # of clip_grad_norm_, times the norm below
    own_norm: bool = False  # ... that this way hands out, rather than dense's
    spike_limit: float | None = None
    gives_back: bool = False

    @property
    def clipping(self) -> str:
        """What clips, for the table."""
        if self.gives_back:
            return "given back"
        if self.spike_limit is not None:
            return f"spike limit {self.spike_limit:g}"
        return "after, own norm" if self.own_norm else "after"


def ways(options: argparse.Namespace) -> Iterator[Way]:
    """All rows, those without clipping first: their norms are the limits' measure."""
    limits = [math.inf, *options.limits]
    for limit in limits:
        yield Way(limit=limit)
    for feedback in options.feedbacks:
        for limit in limits:
            yield Way(feedback, limit)
        if feedback == "ef14":
            for limit in options.limits:
                yield Way(feedback, limit, own_norm=True)
        for spike_limit in options.spike_limits:
            for limit in limits:
                yield Way(feedback, limit, spike_limit=spike_limit)
        if feedback == "ef14":
            for limit in options.limits:
                yield Way(feedback, limit, gives_back=True)


class Task:
    """4096 points and the class that a random perceptron gives each; three quarters to learn."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(1234)
        hidden = torch.randn(32, 64, generator=generator) * 1.5 / math.sqrt(32)
        out = torch.randn(64, 10, generator=generator) * 1.5 / math.sqrt(64)
        self.points = torch.randn(4096, 32, generator=generator)
        self.classes = ((self.points @ hidden).tanh() @ out).argmax(dim=1)
        self.draw = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        self.parameters = list(self.model.parameters())

    def loss(self, indices: Tensor) -> Tensor:
        """Mean cross-entropy of these points."""
        return nn.functional.cross_entropy(self.model(self.points[indices]), self.classes[indices])

    def gradients(self) -> list[list[Tensor]]:
        """Every rank's, of a batch of its own."""
        batches = torch.randint(0, 3072, (RANKS, BATCH), generator=self.draw)
        return [list(torch.autograd.grad(self.loss(b), self.parameters)) for b in batches]

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Of the points that are not learnt."""
        return float(self.loss(torch.arange(3072, 4096)))


@dataclass
class Run:
    """What a run ended with."""

    loss: float
    norm: float  # median, of what the exchange handed out


def train(options: argparse.Namespace, way: Way, limit: float, spike: float, seed: int) -> Run:
    """One run; `limit` is absolute."""
    task = Task(seed)
    make, settings = OPTIMIZERS[options.optimizer]
    optimizer = make(task.parameters, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - step / options.steps)
    )
    oracle = Oracle(
        [p.detach() for p in task.parameters],
        torch.float32,
        RANKS,
        compressor="arc_topk" if way.feedback else "dense",
        feedback=way.feedback or "none",
        eta=0.3 if way.feedback == "ef21m" else None,
        ratio=options.ratio,
        spike_limit=way.spike_limit,
        seed=seed,
    )
    norms = []
    for step in range(options.steps):
        gradients = task.gradients()
        if step == options.steps // 2:
            gradients[0] = [g * spike for g in gradients[0]]
        averaged = [result.output for result in oracle.step(gradients)]
        for parameter, gradient in zip(task.parameters, averaged, strict=True):
            parameter.grad = gradient.clone()
        norms.append(float(nn.utils.clip_grad_norm_(task.parameters, limit)))
        if way.gives_back:
            give_back(oracle, averaged, task.parameters)
        optimizer.step()
        schedule.step()
    return Run(task.validation_loss(), statistics.median(norms))


def give_back(oracle: Oracle, averaged: list[Tensor], parameters: list[nn.Parameter]) -> None:
    """What clipping cut off the average goes back into every rank's residual."""
    for t, (whole, parameter) in enumerate(zip(averaged, parameters, strict=True)):
        if not oracle.views[t].compressed:
            continue  # it has no residual
        assert parameter.grad is not None
        for own in oracle.states:
            own[t].store("e", own[t].load("e") + (whole - parameter.grad).flatten())


def measure(options: argparse.Namespace) -> Iterator[tuple[Way, list[Run], list[Run]]]:
    """Every way's runs, without the spike and with it."""
    norms: dict[str | None, float] = {}
    for way in ways(options):
        norm = norms.get(way.feedback if way.own_norm else None, math.nan)
        limit = way.limit * norm if math.isfinite(way.limit) else math.inf
        plain, spiked = (
            [train(options, way, limit, spike, seed) for seed in range(options.seeds)]
            for spike in (1.0, options.spike)
        )
        norms.setdefault(way.feedback, statistics.mean(run.norm for run in plain))
        yield way, plain, spiked


def text_of(runs: list[Run]) -> str:
    """Mean and standard deviation of the losses."""
    losses = [run.loss for run in runs]
    spread = f" +- {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{spread}"


def main() -> int:
    """Runs the command line; returns the exit status."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    console = Console()
    table = Table(title=f"validation loss, {options.optimizer}, {options.seeds} seeds")
    for column in ("gradients", "clipping", "limit", "loss", f"with a spike of {options.spike:g}"):
        table.add_column(column, justify="left" if column in ("gradients", "clipping") else "right")
    table.add_column("norm handed out", justify="right")
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt), bar:  # Ctrl-C: what there is so far
        task = bar.add_task("training", total=len(list(ways(options))))
        for way, plain, spiked in measure(options):
            name = way.feedback.upper() if way.feedback else "dense"
            limit = f"{way.limit:g}" if math.isfinite(way.limit) else "-"
            norm = statistics.mean(run.norm for run in plain)
            table.add_row(name, way.clipping, limit, text_of(plain), text_of(spiked), f"{norm:.2f}")
            bar.advance(task)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
