"""Predicted step times: where compression pays, by ranks, link and model.

A model, not a measurement: DDP's buckets become ready one after the other over the backward pass
and are all-reduced in that order. An all-reduce of B bytes over N ranks takes

    ring   2 (N - 1) latency + 2 (N - 1) / N B / rate
    tree   2 ceil(log2 N) latency + 2 B / rate                        (pipelined double binary tree)

whichever is less; --ring-only for Gloo. Compression puts its own time on both sides of two smaller
ones. Latency, rate and the hook's own time are given, or come from what step_time.py measured:
--check FILE predicts that run from its links and shows both.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from timing import COMPUTE

EXAMPLES = """\
examples:
  python benchmarks/scaling.py                                     the tables of docs/scaling.md
  python benchmarks/scaling.py --ratio 0.01 --ranks 64 --rates 10 100
  python benchmarks/scaling.py --check n2.json n4.json n8.json     against step_time.py's --json
"""
BUCKET = 25 << 20  # bytes
FLOPS = 4e14  # a GPU's, as training reaches them in bfloat16
BACKWARD, FORWARD = 4, 2  # FLOPs a parameter and token
MOST_RANKS_ON_BYTES = 32
HOOK = 1.5e-11  # seconds of the hook's own an element: an H200, EF21M, float32, 64 M (README)


@dataclass(frozen=True)
class Link:
    """Seconds a message; bytes a second each way."""

    latency: float
    rate: float
    ring_only: bool = False

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds of one."""
        if ranks == 1:
            return 0.0
        ring = 2 * (ranks - 1) * (self.latency + size / ranks / self.rate)
        tree = 2 * math.ceil(math.log2(ranks)) * self.latency + 2 * size / self.rate
        return ring if self.ring_only else min(ring, tree)


@dataclass(frozen=True)
class Way:
    """How a bucket is averaged.

    Attributes:
        shares: of dense float32's bytes, a collective each.
        hook: seconds of its own an element.
    """

    name: str
    shares: tuple[float, ...]
    hook: float = 0.0


def exposed(way: Way, link: Link, ranks: int, numel: float, backward: float) -> float:
    """Seconds that averaging adds to a step."""
    buckets = max(1, math.ceil(4 * numel / BUCKET))
    size, own = 4 * numel / buckets, way.hook * numel / buckets
    free = 0.0
    for bucket in range(buckets):
        ready = backward * (bucket + 1) / buckets + own / 2
        wire = sum(link.all_reduce(share * size, ranks) for share in way.shares)
        free = max(free, ready) + wire
    return free + own / 2 - backward


def ways(ratio: float, ranks: int) -> list[Way]:
    """Dense and the others; of ARC-Top-K a sketch of four columns in a thousand-column matrix."""
    sketch, hook = 0.004, HOOK
    byte = 0.25 if ranks <= MOST_RANKS_ON_BYTES else 0.5  # then bfloat16 takes their place
    return [
        Way("dense", (1.0,)),
        Way("bf16", (0.5,)),
        Way("ARC-Top-K", (sketch, ratio), hook),
        Way("ARC-Top-K, bf16", (sketch / 2, ratio / 2), hook),
        Way("ARC-Top-K, uint8", (sketch / 2, ratio * byte), hook),
    ]


def predictions(args: argparse.Namespace) -> Iterator[Table]:
    """A table a model size: ranks and rates down, ways across."""
    for millions in args.parameters:
        numel = 1e6 * millions
        backward = BACKWARD * numel * args.tokens / FLOPS
        forward = FORWARD * numel * args.tokens / FLOPS
        shown = Table(
            title=f"{millions:g} M parameters, {args.tokens} tokens a rank, ratio {args.ratio:g}: "
            f"{1e3 * (forward + backward):.3g} ms without averaging",
            title_justify="left", box=None, padding=(0, 2, 0, 0),
        )  # fmt: skip
        shown.add_column("ranks", justify="right")
        shown.add_column("Gbit/s", justify="right")
        for way in ways(args.ratio, 1):
            shown.add_column(way.name + ", ms", justify="right")
        for ranks in args.ranks:
            for rate in args.rates:
                link = Link(args.latency * 1e-6, rate * 1e9 / 8, args.ring_only)
                steps = [
                    forward + backward + exposed(way, link, ranks, numel, backward)
                    for way in ways(args.ratio, ranks)
                ]
                plain = min(steps[:2])
                cells = [
                    f"{1e3 * step:.3g}" if i < 2 or step < plain else f"[red]{1e3 * step:.3g}[/red]"
                    for i, step in enumerate(steps)
                ]
                shown.add_row(str(ranks), f"{rate:g}", *cells)
        yield shown


def check(files: list[Path]) -> Table:
    """What step_time.py measured beside what is predicted from its links."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for column in (
        "ranks",
        "method",
        "rate",
        "replayed ms",
        "measured ms",
        "predicted ms",
        "ratio",
    ):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for file in files:
        for link in json.loads(file.read_text())["links"]:
            ranks = int(link["label"].split()[0])
            wire = Link(link["round_trip_s"] / 2, link["measured"] / 8, ring_only=True)
            for row in link["rows"]:
                if row["replay_s"] is not None and row.get("link_bytes"):
                    shown.add_row(*_checked(row, link, wire, ranks))
    return shown


def _checked(row: dict[str, Any], link: dict[str, Any], wire: Link, ranks: int) -> list[str]:
    dense = 8 * (ranks - 1) / ranks * row["numel"]
    phases = row.get("phases_ms")
    own = 0.0
    if phases:
        own = statistics.median(sum(p[name] for name in COMPUTE) for p in phases) / 1e3
    way = Way(row["method"], (row["link_bytes"] / dense,), own / row["numel"])
    predicted = row["replay_s"] + exposed(way, wire, ranks, row["numel"], row["replay_s"])
    measured = statistics.median(row["ms"]) / 1e3
    return [
        str(ranks), row["method"], link["rate"], f"{1e3 * row['replay_s']:g}",
        f"{1e3 * measured:.0f}", f"{1e3 * predicted:.0f}", f"{measured / predicted:.2f}",
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--parameters", type=float, nargs="+", default=[60, 350, 1300, 7000], help="millions")
    add("--ranks", type=int, nargs="+", default=[8, 64, 512])
    add("--rates", type=float, nargs="+", default=[1, 10, 100, 400], help="Gbit/s")
    add("--latency", type=float, default=10, help="us a message (default %(default)s)")
    add("--tokens", type=int, default=8192, help="a rank and step (default %(default)s)")
    add("--ratio", type=float, default=0.1, help="default %(default)s")
    add("--ring-only", action="store_true", help="no trees")
    add("--check", type=Path, nargs="+", metavar="FILE", help="step_time.py's --json")
    return p


def main() -> None:
    """Runs the command line."""
    args = parser().parse_args()
    console = Console()
    if not console.is_terminal:
        console.width = 150  # a file has no edge to wrap at
    if args.check:
        console.print(check(args.check))
        return
    for shown in predictions(args):
        console.print(shown)
        console.print()


if __name__ == "__main__":
    main()
