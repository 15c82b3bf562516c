"""Which runs there are, and in which order; at most 300."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator

from evidence.methods import FEEDBACKS, METHODS, TABLE, TRIALS, Method
from evidence.runs import Record, Results, Run
from evidence.tasks import TASKS

MOST_RUNS = 300
BUDGETS = (0.1, 0.05, 0.025, 0.012, 0.006)  # the first is the one that methods are tuned at
SEEDS = (0, 1, 2)
RANKS = 4
OTHER_RANKS, RANK_BUDGETS = (1, 2, 8, 16), (0.1, 0.025)
TRIAL_BUDGET = 0.025
LONG_STEPS, LONG_BUDGETS = 3000, (0.025, 0.012)
# Tasks beside the small language model compare fewer methods: tuned dense, and the curve's.
STAGES = ("quadratics", "grid", "final", "curve", "trial", "ranks", "long")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run and the stage that it belongs to, a name of `STAGES`."""

    stage: str
    run: Run


def plan() -> list[Planned]:
    """All runs, in order; those behind the grid have no settings yet: `settled`."""
    planned = list(_quadratics())
    for task in ("lm-small", "digits", "minilm", "lm-large"):
        planned += _grid(task)
        planned += _final(task)
    planned += [*_curve(), *_trial(), *_ranks(), *_long()]
    return planned


def _quadratics() -> Iterator[Planned]:
    for task in ("quadratics", "quadratics-noise"):
        for method in FEEDBACKS:
            yield Planned("quadratics", _run(task, method, None, lr=0.1, beta1=0.0))
    for ranks in (1, 2, 8):
        run = _run("quadratics-noise", "ARC-Top-K EF14", None, lr=0.1, beta1=0.0)
        yield Planned("quadratics", dataclasses.replace(run, ranks=ranks))


def methods_of(task: str) -> list[Method]:
    """Those that a task compares: all for the small language model, elsewhere the curve's."""
    return [
        m for m in TABLE.values() if task == "lm-small" or m.curve or m.name == "dense"
    ]  # fmt: skip


def family(task: str, method: Method) -> str:
    """The method whose grid decides for this one. The large model has the small one's."""
    return method.tuned_as or method.name


def grid_task(task: str) -> str:
    """The task whose grid decides for this one: the large model takes the small one's."""
    return "lm-small" if task == "lm-large" else task


def grid(task: str, method: str) -> list[Run]:
    """A family's grid: every learning rate at the first beta1, then at the others."""
    settings = TASKS[task]
    budget = BUDGETS[0] if METHODS[method].budgeted else None
    return [
        _run(task, method, budget, lr=lr, beta1=beta1)
        for beta1 in settings.beta1s
        for lr in settings.lrs
    ]


def _grid(task: str) -> list[Planned]:
    if grid_task(task) != task:
        return []
    owners = dict.fromkeys(family(task, method) for method in methods_of(task))
    runs = [run for owner in owners for run in grid(task, owner)]
    first = TASKS[task].beta1s[0]
    return [Planned("grid", run) for run in sorted(runs, key=lambda run: run.beta1 != first)]


def _final(task: str) -> list[Planned]:
    """Each method at 10 %, tuned, with every seed; a family's own first seed is in its grid."""
    seeds = SEEDS if task != "lm-large" else SEEDS[:1]
    return [
        Planned("final", run)
        for method in methods_of(task)
        for seed in seeds
        for run in [_run(task, method.name, BUDGETS[0] if method.budgeted else None, seed=seed)]
        if seed or method.tuned_as or grid_task(task) != task
    ]


def _curve() -> list[Planned]:
    """The small language model at fewer bytes; 3 seeds where the goals are."""
    return [
        Planned("curve", _run("lm-small", method.name, budget, seed=seed))
        for budget in (0.025, 0.012, 0.05, 0.006)
        for method in TABLE.values()
        if method.curve
        for seed in (SEEDS if budget in LONG_BUDGETS else SEEDS[:1])
    ]


def _trial() -> list[Planned]:
    """What was tried, where low rank and rows are far apart."""
    return [
        Planned("trial", _run("lm-small", method, TRIAL_BUDGET, seed=seed))
        for method in TRIALS
        for seed in SEEDS
    ]


def _ranks() -> list[Planned]:
    return [
        Planned("ranks", dataclasses.replace(run, ranks=ranks))
        for ranks in OTHER_RANKS
        for method in TABLE.values()
        if method.ranks
        for budget in (RANK_BUDGETS if method.budgeted else (None,))
        for run in [_run("lm-small", method.name, budget)]
    ]


def _long() -> list[Planned]:
    """3000 steps of what runs at other ranks too, at the goals' bytes."""
    return [
        Planned("long", dataclasses.replace(run, steps=LONG_STEPS))
        for method in TABLE.values()
        if method.ranks
        for budget in (LONG_BUDGETS if method.budgeted else (None,))
        for run in [_run("lm-small", method.name, budget)]
    ]


def _run(
    task: str,
    method: str,
    budget: float | None,
    seed: int = 0,
    lr: float | None = None,
    beta1: float | None = None,
) -> Run:
    return Run(task, method, budget, RANKS, TASKS[task].steps, seed, lr, beta1)


# --- tuning --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The best of a grid as far as it was run.

    Attributes:
        lr, beta1: the best's.
        done, points: runs of the grid that are done, and all of them.
        edge: the best learning rate is the grid's least or largest.
    """

    lr: float
    beta1: float
    done: int
    points: int
    edge: bool


def tuned(results: Results, task: str, method: Method) -> Tuned | None:
    """What a method is run with: its family's best, once all learning rates of one beta1 are done.

    A grid that is completed later may have another best: the runs that follow from it are then new
    ones, and what was run with the old settings counts no more.
    """
    task = grid_task(task)
    runs = grid(task, family(task, method))
    losses = {run: final_loss(record) for run in runs if (record := results.get(run))}
    lrs = TASKS[task].lrs
    if not all(run in losses for run in runs[: len(lrs)]):
        return None
    best = min(losses, key=lambda run: losses[run])
    assert best.lr is not None and best.beta1 is not None
    edge = len(lrs) > 1 and best.lr in (min(lrs), max(lrs))
    return Tuned(best.lr, best.beta1, len(losses), len(runs), edge)


def settled(results: Results, run: Run) -> Run | None:
    """The run with lr and beta1; None where its grid is not far enough yet."""
    if run.lr is not None:
        return run
    best = tuned(results, run.task, METHODS[run.method])
    return best and dataclasses.replace(run, lr=best.lr, beta1=best.beta1)


def result_of(results: Results, run: Run) -> Record | None:
    """What a planned run ended with, its settings found; None where it has not been run."""
    found = settled(results, run)
    return results.get(found) if found else None


def final_loss(record: Record) -> float:
    """The last validation loss; infinite where the run diverged or its budget is out of reach."""
    last = record["loss"][-1][1] if "loss" in record else None
    return float("inf") if last is None else float(last)


# --- cost ----------------------------------------------------------------------------------------


def seconds_left(results: Results, runs: Iterable[Run]) -> float:
    """By the runs of the same task and number of ranks so far, else by the task's guess."""
    steps: dict[tuple[str, int], int] = {}
    for run in runs:
        steps[run.task, run.ranks] = steps.get((run.task, run.ranks), 0) + run.steps
    return sum(count * _step_seconds(results, *kind) for kind, count in steps.items())


def _step_seconds(results: Results, task: str, ranks: int) -> float:
    measured = [
        value["seconds"] / value["loss"][-1][0]
        for key, value in results.of(task)
        if key["ranks"] == ranks and "loss" in value
    ]
    return statistics.median(measured or [TASKS[task].seconds * ranks / RANKS])
