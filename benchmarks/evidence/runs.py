"""A run, its key, and the file of results: a JSON line a run, written when the run ends."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: a name of `tasks.TASKS`.
        method: a name of `methods.METHODS`.
        budget: bytes a step that the method may use, as a share of dense float32's, in (0, 1); its
            ratio or rank follows from it and the model. None: the method's bytes are what they are.
        ranks: N.
        steps: of training.
        seed: of parameters, order of the data and the compressor.
        lr, beta1: the optimizer's; None: the best of the method's grid (`plan.settled`).
    """

    task: str
    method: str
    budget: float | None
    ranks: int
    steps: int
    seed: int
    lr: float | None = None
    beta1: float | None = None

    def key(self) -> str:
        """What the run depends on, as JSON: a changed method or task makes another run of it."""
        from evidence.methods import METHODS
        from evidence.tasks import TASKS

        about = {"config": METHODS[self.method].about(), "settings": TASKS[self.task].settings()}
        return json.dumps({**dataclasses.asdict(self), **about}, sort_keys=True)

    def __str__(self) -> str:
        budget = "" if self.budget is None else f" {100 * self.budget:g} %"
        settings = "tuned" if self.lr is None else f"lr {self.lr:g} beta1 {self.beta1:g}"
        return (
            f"{self.task}: {self.method}{budget}, N {self.ranks}, {self.steps} steps, {settings}, "
            f"seed {self.seed}"
        )


class Results:
    """The results in a folder, a file a task.

    Args:
        folder: of the files ``TASK.jsonl``. It need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records: dict[str, tuple[Record, Record]] = {}
        for file in sorted(folder.glob("*.jsonl")):
            for line in _whole_lines(file):
                content = json.loads(line)
                self._keep(content["key"], content["value"])

    def get(self, run: Run) -> Record | None:
        """What the run ended with; None where it has not been run."""
        found = self._records.get(run.key())
        return found[1] if found else None

    def add(self, run: Run, record: Record) -> None:
        """Keeps a result, at once and in one piece: what was cut off by a kill is removed first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{run.task}.jsonl"
        if path.exists():
            os.truncate(path, sum(len(line) + 1 for line in _whole_lines(path)))
        key = json.loads(run.key())
        line = json.dumps({"key": key, "value": record}, allow_nan=False)
        with path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._keep(key, record)

    def of(self, task: str) -> Iterator[tuple[Record, Record]]:
        """All keys and values of a task, also of methods that have changed since."""
        for key, value in self._records.values():
            if key["task"] == task:
                yield key, value

    def _keep(self, key: Record, value: Record) -> None:
        self._records[json.dumps(key, sort_keys=True)] = key, value


def _whole_lines(path: Path) -> list[bytes]:
    """All lines but one that a kill has cut off."""
    return path.read_bytes().split(b"\n")[:-1]
