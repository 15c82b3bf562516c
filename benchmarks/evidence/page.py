"""docs/results.md and its plots, from the results alone."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from evidence.methods import FEEDBACKS, METHODS, TABLE, TRIALS, Method
from evidence.plan import (
    BUDGETS,
    LONG_BUDGETS,
    LONG_STEPS,
    OTHER_RANKS,
    RANK_BUDGETS,
    RANKS,
    SEEDS,
    TRIAL_BUDGET,
    Planned,
    family,
    final_loss,
    grid,
    grid_task,
    methods_of,
    plan,
    result_of,
    tuned,
)
from evidence.plots import draw
from evidence.runs import Record, Results, Run
from evidence.tasks import TASKS

NOT_RUN = "not run"

HEAD = """\
# Results: loss against bytes

Written by `make evidence` from `benchmarks/results/`; nothing here is typed by hand. Ranks are
real: as many processes over Gloo on one machine, each with a DDP and its hook (local SGD: without
DDP) and its own share of the data. Nothing is simulated.

- **bytes**: what a rank hands to the collectives a step, on average over the run, as a share of
  dense float32's; indices, sketches and dense first steps are in it. Counted by the engine, and
  for torch's hooks and local SGD where they call `all_reduce`. **link**: what it then sends by ring
  algorithms, as a share of dense's: Top-K gathers, which costs N / 2 times as much.
- **loss**: validation loss at the end, mean and standard deviation over seeds. **over dense**: of
  the mean.
- **lr, beta1**: the best of one grid, the same for all, at 10 %; "edge": that learning rate is the
  grid's least or largest; "k of n": only so many of its points have been run. What has no grid of
  its own (another wire, fewer bytes, other ranks) takes its family's.
- **bf16**, **uint8**: what rows and second factors travel in. The first collective, with the
  tensors that stay dense in it, is then bfloat16; it is float32 where neither is named. Low rank on
  uint8 sends all in bytes, both factors and 1-D tensors. What `arc_topk.Config()` says is
  ARC-Top-K, uint8.
- PowerSGD is torch's, in one bucket: over several its collectives come in an order of which Gloo
  aborts.
"""

QUADRATICS = """\
## quadratics

Which feedback suits which compressor: [feedback.md](feedback.md).
"""


TRIED = """\
The same bytes dealt out otherwise, by the mean message itself (an all-reduce of X that no engine
would make, not counted), at steps 20, 60, 150 and 300. *rows or low rank*: each matrix as rows or
as columns, whichever leaves less of ||X||^2 behind; "by rows": how often it took rows, over seeds,
looks and matrices. *one budget*: columns to the matrices where they carry most energy a byte.
Neither is in the library.
"""


def write(results: Results, docs: Path) -> None:
    """Writes ``docs/results.md`` and the plots beside it."""
    planned = plan()
    done = sum(result_of(results, p.run) is not None for p in planned)
    parts = [HEAD, f"{done} of {len(planned)} planned runs are done.\n"]
    parts += [_task(results, task, planned, docs) for task in TASKS if "quadratics" not in task]
    parts += [QUADRATICS, _machines(results)]
    (docs / "results.md").write_text("\n".join(parts))
    for task in ("quadratics", "quadratics-noise"):
        fill(docs / "feedback.md", task, quadratics(results, task))


def fill(page: Path, name: str, text: str) -> None:
    """Puts ``text`` between the page's lines ``<!-- NAME: ... -->`` and ``<!-- end -->``."""
    if page.exists():
        begin, end = f"<!-- {name}: written by make evidence -->\n", "<!-- end -->"
        before, rest = page.read_text().split(begin)
        _, after = rest.split(end, 1)
        page.write_text(f"{before}{begin}{text}{end}{after}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns align; the first is text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|".join("-" * (w + 2) if not i else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)]) + "\n"


def spread(losses: Sequence[float]) -> str:
    """Mean and, of several seeds, standard deviation."""
    if not all(map(math.isfinite, losses)):
        return "diverged"
    mean = f"{statistics.mean(losses):.3f}"
    return f"{mean} +- {statistics.stdev(losses):.3f}" if len(losses) > 1 else f"{mean} (one seed)"


# --- a trained task ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """All seeds of a method at a budget."""

    method: Method
    budget: float | None
    records: list[Record]

    @property
    def losses(self) -> list[float]:
        """The last of each seed that was run."""
        return [final_loss(record) for record in self.records]

    def share(self, what: str = "wire_bytes") -> float:
        """Bytes as a share of dense's."""
        return float(self.records[0][what] / self.records[0]["dense_bytes"])


def cell(results: Results, task: str, method: Method, budget: float | None) -> Cell:
    """What has been run of it, at 4 ranks and the task's own number of steps."""
    budget = budget if method.budgeted else None
    runs = [Run(task, method.name, budget, RANKS, TASKS[task].steps, seed) for seed in SEEDS]
    records = [record for run in runs if (record := result_of(results, run))]
    return Cell(method, budget, records)


def _task(results: Results, task: str, planned: list[Planned], docs: Path) -> str:
    about = TASKS[task].about
    title = f"## {task}\n\n{about}; {TASKS[task].steps} steps, {RANKS} ranks.\n"
    dense = cell(results, task, TABLE["dense"], None).losses
    budgets = BUDGETS if task == "lm-small" else BUDGETS[:1]
    cells = [
        cell(results, task, method, budget)
        for method in methods_of(task)
        for budget in (budgets if method.curve else budgets[:1])
    ]
    if not any(c.records for c in cells):
        return f"{title}\n{NOT_RUN}\n"
    rows = [_row(results, task, c, dense) for c in cells]
    header = ("method", "aimed at", "bytes", "link", "lr", "beta1", "loss", "over dense")
    parts = [title, table(header, rows)]
    curves = [c for c in cells if c.records and "loss" in c.records[0]]
    if len(curves) > 2:  # two points would fill the picture with chance
        picture = f"results-{task}.png"
        points = [(c.method.name, c.share(), statistics.mean(c.losses)) for c in curves]
        draw(points, docs / picture, f"{task}: {about}", TASKS[task].unit)
        parts.append(f"![loss against bytes]({picture})\n")
    if task == "lm-small":
        parts += [_trials(results), _ranks(results), _long(results)]
    if grid_task(task) == task:
        parts.append(_grids(results, task))
    return "\n".join(parts)


def _row(results: Results, task: str, c: Cell, dense: list[float]) -> list[str]:
    aimed = _aimed(c.budget)
    if not c.records:
        return [c.method.name, aimed, "", "", "", "", NOT_RUN, ""]
    if "least" in c.records[0]:
        least = f"{100 * c.records[0]['least']:.2f} %"
        return [c.method.name, aimed, f"least: {least}", "", "", "", "out of reach", ""]
    best = tuned(results, task, c.method)
    assert best is not None
    partly = "" if best.done == best.points else f" ({best.done} of {best.points})"
    ratio = statistics.mean(c.losses) / statistics.mean(dense) - 1 if dense else math.nan
    return [
        c.method.name,
        aimed,
        f"{100 * c.share():.2f} %",
        f"{100 * c.share('link_bytes') / (2 * (RANKS - 1) / RANKS):.2f} %",
        f"{best.lr:g}{' edge' if best.edge else ''}{partly}",
        f"{best.beta1:g}",
        spread(c.losses),
        f"{100 * ratio:+.1f} %" if math.isfinite(ratio) else "",
    ]


def _grids(results: Results, task: str) -> str:
    """Every point that methods were tuned on."""
    settings = TASKS[task]
    owners = dict.fromkeys(family(task, method) for method in methods_of(task))
    lrs = sorted(settings.lrs)
    rows = []
    for owner in owners:
        runs = {(run.beta1, run.lr): run for run in grid(task, owner)}
        for beta1 in sorted(settings.beta1s):
            found = [results.get(runs[beta1, lr]) for lr in lrs]
            texts = [f"{final_loss(record):.3f}" if record else NOT_RUN for record in found]
            rows.append([owner, f"{beta1:g}", *texts])
    header = ("loss at 10 %, one seed", "beta1", *(f"lr {lr:g}" for lr in lrs))
    return f"### {task}: the grid\n\n{table(header, rows)}"


def _trials(results: Results) -> str:
    """What was tried and left out, seed by seed, beside low rank as it is."""
    rows = []
    for name in ("low rank, uint8", *TRIALS):
        c = cell(results, "lm-small", METHODS[name], TRIAL_BUDGET)
        steps = TASKS["lm-small"].steps
        runs = [Run("lm-small", name, TRIAL_BUDGET, RANKS, steps, seed) for seed in SEEDS]
        share = f"{100 * c.share():.2f} %" if c.records else ""
        mean = spread(c.losses) if c.records else NOT_RUN
        by_rows = [look["by_rows"] for r in c.records for k, look in r.items() if _is_look(k)]
        taken = str(sum(by_rows)) if by_rows else ""
        rows.append([name, share, *(_loss(results, run) for run in runs), mean, taken])
    header = ("loss", "bytes", *(f"seed {seed}" for seed in SEEDS), "mean", "by rows")
    return f"### lm-small: trials at {_aimed(TRIAL_BUDGET)}\n\n{TRIED}\n{table(header, rows)}"


def _is_look(field: str) -> bool:
    return field.startswith("step ")


def _ranks(results: Results) -> str:
    """Other numbers of ranks."""
    rows = []
    counts = sorted([RANKS, *OTHER_RANKS])
    steps = TASKS["lm-small"].steps
    for method in (m for m in TABLE.values() if m.ranks):
        for budget in RANK_BUDGETS if method.budgeted else (None,):
            runs = [Run("lm-small", method.name, budget, n, steps, 0) for n in counts]
            rows.append([method.name, _aimed(budget), *(_loss(results, run) for run in runs)])
    header = ("loss, one seed", "aimed at", *(f"N = {n}" for n in counts))
    return (
        f"### lm-small: other numbers of ranks\n\nEach rank has 8 windows.\n\n{table(header, rows)}"
    )


def _long(results: Results) -> str:
    """3000 steps."""
    rows = []
    for method in (m for m in TABLE.values() if m.ranks):
        for budget in LONG_BUDGETS if method.budgeted else (None,):
            run = Run("lm-small", method.name, budget, RANKS, LONG_STEPS, 0)
            residual = (result_of(results, run) or {}).get("residual", [])
            first_and_last = [f"{residual[at][1]:.2f}" for at in (0, -1)] if residual else ["", ""]
            rows.append([method.name, _aimed(budget), _loss(results, run), *first_and_last])
    header = ("one seed", "aimed at", "loss", "residual, early", "at the end")
    about = "residual: |mean e| / |mean g| over ranks at the first checkpoint and at the last."
    return f"### lm-small: {LONG_STEPS} steps\n\n{about}\n\n{table(header, rows)}"


def _aimed(budget: float | None) -> str:
    return "" if budget is None else f"{100 * budget:g} %"


def _loss(results: Results, run: Run) -> str:
    record = result_of(results, run)
    return f"{final_loss(record):.3f}" if record else NOT_RUN


# --- quadratics ----------------------------------------------------------------------------------


def quadratics(results: Results, task: str) -> str:
    """The feedbacks of one of the two tasks: compressors down, feedbacks across."""
    rows = []
    for compressor in dict.fromkeys(name.rsplit(" ", 1)[0] for name in FEEDBACKS):
        names = [name for name in FEEDBACKS if name.rsplit(" ", 1)[0] == compressor]
        rows.append([compressor, *(_plateau(results, task, name, RANKS) for name in names)])
    text = table((f"f / f0, N = {RANKS}", "EF14", "EF21", "EF21M, eta 0.1"), rows)
    if TASKS[task].settings()["noise"]:
        counts = (1, 2, 4, 8)
        cells = [_plateau(results, task, "ARC-Top-K EF14", n) for n in counts]
        text += "\n" + table(
            ("f / f0", *(f"N = {n}" for n in counts)), [["ARC-Top-K EF14", *cells]]
        )
    return text


def _plateau(results: Results, task: str, method: str, ranks: int) -> str:
    run = Run(task, method, None, ranks, TASKS[task].steps, 0, 0.1, 0.0)
    record = results.get(run)
    if record is None:
        return NOT_RUN
    if record["loss"][-1][1] is None:
        return "diverged"
    last = 5 if TASKS[task].settings()["noise"] else 1  # a plateau, or still falling
    return f"{statistics.mean(loss for _, loss in record['loss'][-last:]):.1e}"


def _machines(results: Results) -> str:
    """Where it was measured."""
    found = {
        (value["cpu"], value["isa"], value["torch"], value["arc_topk"], value["python"])
        for task in TASKS
        for _, value in results.of(task)
        if "cpu" in value
    }
    lines = [
        f"- {cpu}, {isa}; torch {torch}, arc-topk {own}, Python {python}"
        for cpu, isa, torch, own, python in sorted(found)
    ]
    return "\n".join(["## Measured on\n", *(lines or [NOT_RUN])]) + "\n"
