"""Shows and writes down how a training run goes: progress bar, CSV, TensorBoard."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclasses.dataclass
class Record:
    """One step; bytes are of this rank and summed since the run began."""

    step: int
    loss: float  # of rank 0's batch, nats a byte
    learning_rate: float
    gradient_norm: float  # of the averaged gradient, before clipping
    step_ms: float  # data to optimizer step, without validation and logging
    wire_bytes: int
    link_bytes: int
    validation_loss: float | None = None  # only at steps that validate


class Log:
    """Writes records to every place that was asked for; on ranks other than 0 does nothing.

    Args:
        title: shown before the progress bar.
        first: steps already done, before a resume.
        steps: last step.
        table: CSV file, or None. A resumed run appends to it.
        tensorboard: folder of TensorBoard's log, or None.
        active: whether this is rank 0.

    Raises:
        ModuleNotFoundError: a TensorBoard log is asked for and tensorboard is not installed.
    """

    def __init__(
        self,
        title: str,
        first: int,
        steps: int,
        table: Path | None,
        tensorboard: Path | None,
        active: bool,
    ) -> None:
        self._active = active
        self._title = title
        self._bytes_before = 0
        self._file: TextIO | None = None
        self._csv: csv.DictWriter[str] | None = None
        self._board: Any = None
        if not active:
            return
        columns = [field.name for field in dataclasses.fields(Record)]
        if table:
            table.parent.mkdir(parents=True, exist_ok=True)
            self._file = table.open("a" if first else "w", newline="")
            self._csv = csv.DictWriter(self._file, columns)
            if self._file.tell() == 0:
                self._csv.writeheader()
        if tensorboard:
            self._board = _summary_writer(tensorboard)
        self._console = Console()
        self._progress = Progress(
            TextColumn(f"{title:<18}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=first, numbers="")

    def __enter__(self) -> Log:
        if self._active:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active:
            self._progress.stop()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._active:
            self._console.print(text, highlight=False, soft_wrap=True)

    def write(self, record: Record) -> None:
        """Takes one step into all logs."""
        if not self._active:
            return
        wire = (record.wire_bytes - self._bytes_before) / 1e3
        self._bytes_before = record.wire_bytes
        numbers = f"loss {record.loss:.3f}  {record.step_ms:.0f} ms  {wire:,.1f} kB/step"
        self._progress.update(self._task, completed=record.step, numbers=numbers)
        if record.validation_loss is not None:
            validation = f"validation {record.validation_loss:.4f}"
            self.say(f"{self._title:<17} step {record.step:>5}  {validation}  {numbers}")
        row = dataclasses.asdict(record)
        if self._csv:
            self._csv.writerow(row)
        if self._board:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, record.step)


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--tensorboard needs the package tensorboard: pip install tensorboard, "
            "or use --csv FILE"
        ) from error
    return SummaryWriter(str(folder))
