"""What an engine will do with each tensor, and what it will cost, before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from arc_topk import _C
from arc_topk.config import Config


@dataclass(frozen=True)
class PlanRow:
    """One tensor.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        dtype: of the gradient.
        view: (m, n), the matrix it is seen as; None for a tensor that stays dense.
        kept: K, rows of that matrix sent a step, or columns of low rank's two factors; None for a
            tensor that stays dense.
        wire_bytes: bytes a rank hands to the collectives for it, a step.
        dense_bytes: what plain averaging would hand over.
        state_bytes: memory of its error feedback on each rank, and of low rank's factors.
        why_dense: why it is not compressed; empty if it is.
        resync_every: steps from one resync to the next (`Config.resync_every`); 0: there is none.
        resync_bytes: bytes a rank hands to the collectives for it in such a step, on top.
        wire_dtype: what it travels in: its rows, or all of a tensor that stays dense.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: tuple[int, int] | None
    kept: int | None
    wire_bytes: int
    dense_bytes: int
    state_bytes: int
    why_dense: str
    resync_every: int
    resync_bytes: int
    wire_dtype: torch.dtype


@dataclass(frozen=True)
class Plan:
    """The plan of all tensors. ``str()`` or ``print()`` gives an aligned table with totals.

    Attributes:
        rows: one a tensor, in the order of the model's parameters.
        transport: what payloads travel over, as in `State.metrics`; empty where nobody has told.
        notes: what is not as the configuration asks for, and why; a sentence each.
    """

    rows: tuple[PlanRow, ...]
    transport: str = ""
    notes: tuple[str, ...] = ()

    @property
    def wire_bytes(self) -> int:
        """Bytes a rank hands to the collectives in a compressed step."""
        return sum(row.wire_bytes for row in self.rows)

    @property
    def dense_bytes(self) -> int:
        """Bytes a rank hands to the collectives in a step of plain averaging."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def resync_bytes(self) -> float:
        """Bytes of resyncs a rank and step, on average, beyond `wire_bytes`."""
        return sum(row.resync_bytes / row.resync_every for row in self.rows if row.resync_every)

    @property
    def state_bytes(self) -> int:
        """Memory of the error feedback, in bytes a rank."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        header = ["parameter", "view", "K", "wire bytes", "dense bytes", "state bytes", "why dense"]
        lines = [header]
        for row in self.rows:
            view = f"{row.view[0]} x {row.view[1]}" if row.view else "x".join(map(str, row.shape))
            kept = str(row.kept) if row.kept is not None else "-"
            sizes = [f"{n:,}" for n in (row.wire_bytes, row.dense_bytes, row.state_bytes)]
            lines.append([row.name, view, kept, *sizes, row.why_dense])
        totals = [f"{n:,}" for n in (self.wire_bytes, self.dense_bytes, self.state_bytes)]
        share = self.wire_bytes / self.dense_bytes if self.dense_bytes else 1.0
        lines.append(["total", "", "", *totals, f"wire/dense {share:.3f}"])
        over = [f"payloads travel over {self.transport}"] if self.transport else []
        for every in sorted({row.resync_every for row in self.rows if row.resync_every}):
            size = sum(row.resync_bytes for row in self.rows if row.resync_every == every)
            over.append(f"every {every} steps {size:,} bytes more, to resync shared estimates")
        return "\n".join([_aligned(lines), *over, *self.notes])


def make_plan(
    config: Config,
    tensors: Iterable[tuple[str, torch.Tensor]],
    world_size: int,
    transport: str = "",
    step: int | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan for named tensors: their shapes, strides and dtypes are used, not their values.

    ``step``: whose ratios count; None: those behind the warm-up. ``notes``: more of them.
    """
    native = config.native()
    rows = []
    for name, tensor in tensors:
        ratio = config.ratio_of(name)
        if step is not None:
            ratio = _C.ratio_at(native, ratio, step)
        m, n, kept, wire, dense, state, why, every, resync, travels = _C.describe(
            native, tensor.shape, tensor.stride(), tensor.dtype, world_size, ratio
        )
        view = (m, n) if kept else None
        about = (name, tuple(tensor.shape), tensor.dtype, view, kept or None)
        rows.append(
            PlanRow(*about, wire, dense, state, why, every, resync if every else 0, travels)
        )
    told = (*(_of_warmup(config) if step is None else ()), *_notes(config, rows, world_size))
    return Plan(tuple(rows), transport, (*told, *notes))


def _of_warmup(config: Config) -> tuple[str, ...]:
    if not config.warmup_steps:
        return ()
    behind = f" behind step {config.start_step}" if config.start_step else ""
    return (
        f"the ratio falls to it over the first {config.warmup_steps} steps{behind}: K and bytes "
        "are those for good",
    )


def _notes(config: Config, rows: Sequence[PlanRow], world_size: int) -> tuple[str, ...]:
    instead = {row.wire_dtype for row in rows if row.kept} - {config.wire}
    if config.wire != torch.uint8 or not instead:
        return ()
    (travels,) = instead
    return (
        f"rows travel in {travels}: torch.uint8 has too few levels for {world_size} ranks, "
        "and serves 32 at most",
    )


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Text left, numbers right; the first and last column are text."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    numbers = range(2, len(widths) - 1)
    text = []
    for line in lines:
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)
