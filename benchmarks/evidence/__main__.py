"""`make evidence`: runs what is not there yet, then writes docs/results.md."""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from evidence import DOCS, RESULTS
from evidence.page import write
from evidence.plan import STAGES, Planned, plan, seconds_left, settled
from evidence.ranks import Ranks
from evidence.runs import Results, Run
from evidence.tasks import TASKS
from evidence.train import train

EXAMPLES = """\
examples:
  make evidence                                goes on where it stopped; Ctrl-C loses one run
  make evidence ARGS=--list                    the plan: what is done, what is open, how long
  make evidence ARGS="--task lm-small --only grid dense"
                                               the runs whose description has all these words
  make evidence ARGS=--plot                    docs/results.md and its plots anew, no run
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="make evidence",
        description="Trains every task with every method, keeps each run in benchmarks/results/, "
        "and writes docs/results.md.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--task", choices=TASKS, help="runs of this task alone")
    add("--only", nargs="+", default=[], metavar="WORD",
        help=f"runs whose stage ({', '.join(STAGES)}) or description has every word")  # fmt: skip
    add("--list", action="store_true", help="show the plan and run nothing")
    add("--plot", action="store_true", help="write the page and run nothing")
    add("--results", type=Path, default=RESULTS, help="folder of results (benchmarks/results)")
    add("--docs", type=Path, default=DOCS, help="folder of the page (docs)")
    return p


def chosen(options: argparse.Namespace) -> list[Planned]:
    """The planned runs that the command line names."""
    return [
        planned
        for planned in plan()
        if options.task in (None, planned.run.task)
        and all(word in f"{planned.stage} {planned.run}" for word in options.only)
    ]


def show(planned: list[Planned], results: Results, console: Console) -> None:
    """The plan: stages with what is done and open, and the open runs."""
    table = Table("task", "stage", "done", "open", "minutes left", box=None)
    for (task, stage), group in itertools.groupby(planned, lambda p: (p.run.task, p.stage)):
        runs = [p.run for p in group]
        open_ = [run for run in runs if not done(results, run)]
        minutes = seconds_left(results, open_) / 60
        counts = str(len(runs) - len(open_)), str(len(open_))
        table.add_row(task, stage, *counts, f"{minutes:.0f}")
    for p in planned:
        state = "done" if done(results, p.run) else "open"
        console.print(f"{state} {p.stage:<10} {p.run}", highlight=False, soft_wrap=True)
    console.print(table)


def done(results: Results, run: Run) -> bool:
    """Whether a planned run has its result."""
    found = settled(results, run)
    return found is not None and results.get(found) is not None


@functools.cache
def ready(task: str, console: Console) -> bool:
    """Whether what a task needs is installed; says so, once, where it is not."""
    missing = TASKS[task].missing()
    if missing:
        names = ", ".join(missing)
        console.print(f"{task} is left out, without {names}: requirements/evidence.txt has them")
    return not missing


def work(planned: list[Planned], results: Results, console: Console) -> None:
    """Runs what is open. Ranks stay up from one run to the next of as many."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"),
        TimeElapsedColumn(), console=console,
    )  # fmt: skip
    with bar:
        todo = [p.run for p in planned if not done(results, p.run) and ready(p.run.task, console)]
        left = collections.deque(todo)
        task = bar.add_task("", total=len(todo), left="")
        for count, group in itertools.groupby(todo, lambda run: run.ranks):
            with Ranks(count) as ranks:
                for run in group:
                    minutes = seconds_left(results, left) / 60
                    found = settled(results, run)
                    bar.update(task, description=str(found or run), left=f"{minutes:.0f} min left")
                    if found is None:
                        console.print(f"waits for its grid: {run}", highlight=False)
                    elif results.get(found) is None:
                        record = ranks.call(train, found)
                        results.add(found, record)
                        loss = record["loss"][-1][1] if "loss" in record else "out of reach"
                        console.print(f"{found}: {loss}", highlight=False, soft_wrap=True)
                    left.popleft()
                    bar.advance(task)


def main() -> int:
    """Runs the command line; returns the exit status."""
    options = parser().parse_args()
    console = Console()
    results = Results(options.results)
    planned = chosen(options)
    if options.list:
        show(planned, results, console)
        return 0
    try:
        if not options.plot:
            work(planned, results, console)
    except KeyboardInterrupt:
        console.print("stopped: the next call goes on from here")
    finally:
        write(results, options.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
