"""The demo: one model, seven ways to average its gradients.

``python examples/train_ddp.py --demo`` (what ``make demo`` runs) trains them one after the other on
the same ranks, checks each run, and writes table and picture.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import RunFailedError
from rich import box
from rich.console import Console
from rich.table import Table
from train_ddp import Outcome, train


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to average gradients, with the optimizer settings that suit it.

    Each way had seven tries of 300 steps, the ranks simulated in one process (beta1 of 0, 0.5 and
    0.9, learning rates from 3e-3 to 2e-2, EF21M's eta of 0.1 and 0.3), then three good ones of
    those in this demo; the best of the three is here, all with one seed. What travels in bytes has
    what was best of the three learning rates of `make evidence` (docs/results.md).
    """

    name: str
    compressor: str
    feedback: str
    beta1: float
    lr: float
    eta: float | None = None
    wire_dtype: str | None = None
    rows: float = 1  # times --ratio: in bytes as much of the wire carries more of them
    color: str = ""


WAYS = (
    Way("dense", "dense", "none", 0.5, 5e-3, color="#444444"),
    Way("ARC-Top-K EF14", "arc_topk", "ef14", 0.5, 1e-2, rows=3, color="#0072b2"),
    Way("ARC-Top-K EF14, float32", "arc_topk", "ef14", 0.5, 1e-2, wire_dtype="float32",
        color="#e69f00"),
    Way("low rank EF14", "low_rank", "ef14", 0.5, 1e-2, color="#cc79a7"),
    Way("ARC-Top-K EF21M", "arc_topk", "ef21m", 0.0, 6e-3, eta=0.3, color="#56b4e9"),
    Way("Top-K EF14", "top_k", "ef14", 0.5, 1e-2, color="#d55e00"),
    Way("Rand-K EF14", "rand_k", "ef14", 0.0, 5e-3, color="#009e73"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """What the demo reports of one way; bytes are those of one rank."""

    name: str
    compressor: str
    feedback: str
    ratio: float | None  # None: dense
    beta1: float
    lr: float
    eta: float | None
    validation_loss: float  # nats a byte, at the end
    step_ms: float  # median
    wire_bytes: float  # a step, mean
    link_bytes: float  # a step, mean
    energy_captured: float | None  # None: dense, or not measured
    curve: list[tuple[int, float, int]]  # step, validation loss, link bytes so far


def prepare(options: argparse.Namespace) -> argparse.Namespace:
    """Makes the output folder, and the runs short for ``--quick``."""
    options = copy.copy(options)
    if options.quick:
        options.steps, options.validate_every, options.warmup = 6, 3, 2
        options.validation_windows = 128
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def work(options: argparse.Namespace) -> None:
    """What each rank does; rank 0 reports.

    Raises:
        RunFailedError: ranks ended with different parameters, or sent other bytes than planned.
    """
    started = time.perf_counter()
    results = []
    for way in WAYS:
        outcome = train(options_of(way, options), title=way.name)
        check_bytes(way, outcome)
        results.append(result_of(way, outcome, options))
        del outcome
        gc.collect()  # ends the hook's threads before the next run is timed
    if dist.get_rank() == 0:
        report(results, options, time.perf_counter() - started)


def options_of(way: Way, options: argparse.Namespace) -> argparse.Namespace:
    """The command line's options with one way's own settings in their place."""
    options = copy.copy(options)
    options.compressor, options.feedback, options.eta = way.compressor, way.feedback, way.eta
    options.rank = None
    options.wire_dtype = way.wire_dtype
    options.ratio = min(1.0, way.rows * options.ratio)
    options.lr, options.betas = way.lr, (way.beta1, options.betas[1])
    slug = way.name.lower().replace(" ", "-").replace(",", "")
    options.csv = options.out / f"{slug}.csv"
    options.tensorboard = options.tensorboard and options.tensorboard / slug
    options.checkpoint = options.resume = None
    return options


def check_bytes(way: Way, outcome: Outcome) -> None:
    """Compares the bytes handed to the collectives with the plan's, to the byte, on every rank.

    Raises:
        RunFailedError: on every rank, with the first rank's numbers that differ.
    """
    first_dense = way.compressor != "dense" and way.feedback in ("ef21", "ef21m")
    compressed = outcome.steps - first_dense
    planned = compressed * outcome.plan.wire_bytes + first_dense * outcome.plan.dense_bytes
    for row in outcome.plan.rows:
        if row.resync_every:
            planned += outcome.steps // row.resync_every * row.resync_bytes
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (planned, outcome.metrics["wire_bytes"]))
    for rank, (expected, measured) in enumerate(everyone):
        if expected != measured:
            raise RunFailedError(
                f"{way.name}: rank {rank} sent {measured} bytes in {outcome.steps} steps, "
                f"but plan() says {expected}"
            )


def result_of(way: Way, outcome: Outcome, options: argparse.Namespace) -> Result:
    """One way's line of the table."""
    energy = outcome.metrics["energy_captured"]
    return Result(
        way.name,
        way.compressor,
        way.feedback,
        None if way.compressor == "dense" else options_of(way, options).ratio,
        way.beta1,
        way.lr,
        way.eta,
        outcome.validation[-1][1],
        outcome.step_ms,
        outcome.metrics["wire_bytes"] / outcome.steps,
        outcome.metrics["link_bytes"] / outcome.steps,
        None if way.compressor == "dense" or math.isnan(energy) else energy,
        outcome.validation,
    )


COLUMNS = (
    "gradients", "ratio", "beta1", "lr", "eta", "val.\nloss", "step\nms", "wire kB\na step",
    "link kB\na step", "energy\ncaptured",
)  # fmt: skip


def cells(result: Result) -> list[str]:
    """One line of the table, as text."""
    return [
        result.name,
        "-" if result.ratio is None else f"{result.ratio:g}",
        f"{result.beta1:g}",
        f"{result.lr:g}",
        "-" if result.eta is None else f"{result.eta:g}",
        f"{result.validation_loss:.3f}",
        f"{result.step_ms:.0f}",
        f"{result.wire_bytes / 1e3:.0f}",
        f"{result.link_bytes / 1e3:.0f}",
        "-" if result.energy_captured is None else f"{result.energy_captured:.2f}",
    ]


def report(results: list[Result], options: argparse.Namespace, seconds: float) -> None:
    """Prints the table; writes it, the numbers and the picture into the output folder."""
    table = Table(title=caption(options), box=box.SIMPLE_HEAD, padding=0)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for result in results:
        table.add_row(*cells(result))
    Console().print(table)

    (options.out / "results.md").write_text(markdown(results, options))
    content = {
        "torch": torch.__version__,
        "ranks": dist.get_world_size(),
        "steps": options.steps,
        "seconds": round(seconds, 1),
        "results": [dataclasses.asdict(result) for result in results],
    }
    (options.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    picture(results, options.out / "demo.png", caption(options))
    print(
        "Checked after every run: parameters bit-identical on all ranks, bytes sent as plan() says."
        f"\n{seconds:.0f} s. Table, numbers, picture: "
        + ", ".join(str(options.out / name) for name in ("results.md", "results.json", "demo.png"))
    )


def caption(options: argparse.Namespace) -> str:
    """What the runs have in common."""
    return (
        f"byte-level transformer, {options.layers} layers of width {options.width}, "
        f"{dist.get_world_size()} ranks, {options.steps} steps"
    )


def markdown(results: list[Result], options: argparse.Namespace) -> str:
    """The table for a README."""
    lines = [
        "| " + " | ".join(column.replace("\n", " ") for column in COLUMNS) + " |",
        "|---|" + "--:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(cells(result)) + " |" for result in results),
    ]
    return f"{caption(options)}:\n\n" + "\n".join(lines) + "\n"


def picture(results: list[Result], path: Path, title: str) -> None:
    """Draws validation loss against steps, and against bytes sent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {way.name: way.color for way in WAYS}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    for result in results:
        steps, losses, sent = zip(*result.curve, strict=True)
        label = f"{result.name}: {losses[-1]:.3f}"
        style = {"color": colors[result.name], "marker": "o", "markersize": 3, "label": label}
        left.plot(steps, losses, **style)
        right.plot([bytes_ / 1e6 for bytes_ in sent], losses, **style)
    left.set(xlabel="step", ylabel="validation loss (nats per byte)")
    right.set(xlabel="MB sent by a rank (ring algorithms, all overheads counted)", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.11, 1, 1))  # the legend lies below
    figure.savefig(path, dpi=150)
    plt.close(figure)
