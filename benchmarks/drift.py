"""How far EF21's shared estimate h drifts from the mean of the ranks' own, by the oracle.

h takes the reduced rows, h_i what rank i sent: what sums on a narrow wire round, on their way, is
in h alone. Every `resync_every` steps h is set to that mean again. docs/algorithm.md has the table.

Gradients are "mean": a mean, a difference between ranks and noise, all of one size; or "noise": a
part that all ranks share and one of each rank's own, both drawn anew in every step.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from arc_topk.reference import Oracle

SHAPE = (64, 32)
RANKS = 4
WIRES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}
SETTINGS = [
    ("bfloat16", 0),
    ("bfloat16", 128),
    ("bfloat16", 32),
    ("bfloat16", 8),
    ("float16", 0),
    ("float32", 0),
    ("float32", 512),
    ("uint8", 0),
    ("uint8", 512),
]
LOOK_EVERY = 7  # steps; no multiple of a resync's


class Gradients:
    """A step's gradients, one a rank; the same in every run."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._chance = torch.Generator().manual_seed(1)
        self._mean = self._normal(1)[0]
        apart = self._normal(RANKS)
        self._apart = apart - apart.mean(0)

    def _normal(self, count: int) -> Tensor:
        return torch.randn(count, *SHAPE, generator=self._chance)

    def of(self, step: int) -> list[list[Tensor]]:
        """Of all ranks."""
        noise = self._normal(RANKS)
        if self._kind == "noise":
            return [[g] for g in self._normal(1) + noise]
        return [[g] for g in self._mean * (1 + 0.5 * math.sin(step / 100)) + self._apart + noise]


def drift_of(oracle: Oracle) -> float:
    """|h - mean h_i| / |h|."""
    h = oracle.state("h", 0, 0).double()
    mean = torch.stack([oracle.state("h_i", i, 0).double() for i in range(RANKS)]).mean(0)
    return float((h - mean).norm() / h.norm())


def largest(feedback: str, wire: str, every: int, kind: str, steps: int) -> float:
    """The largest drift in the second half of so many steps."""
    oracle = Oracle(
        [SHAPE], torch.float32, RANKS, feedback=feedback, ratio=0.1, wire_dtype=WIRES[wire],
        resync_every=every,
    )  # fmt: skip
    gradients = Gradients(kind)
    worst = 0.0
    for step in range(steps):
        oracle.step(gradients.of(step))
        if 2 * step >= steps and step % LOOK_EVERY == 0:
            worst = max(worst, drift_of(oracle))
    return worst


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--steps", type=int, default=2000, help="default %(default)s")
    p.add_argument("--feedback", default="ef21m", choices=("ef21", "ef21m"))
    options = p.parse_args(arguments)
    if options.steps < 2 * LOOK_EVERY:
        p.error(f"--steps is {options.steps}; expected at least {2 * LOOK_EVERY}")
    torch.set_num_threads(1)
    console = Console()
    table = Table(box=None, pad_edge=False)
    for name in ("wire", "resync_every", "mean", "noise"):
        table.add_column(name, justify="left" if name == "wire" else "right")
    with Progress(console=console) as progress:
        for wire, every in progress.track(SETTINGS, description=options.feedback):
            drifts = [
                largest(options.feedback, wire, every, kind, options.steps)
                for kind in ("mean", "noise")
            ]
            table.add_row(wire, str(every or "never"), *(f"{drift:.1e}" for drift in drifts))
    console.print(table)


if __name__ == "__main__":
    main()
