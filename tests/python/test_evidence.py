"""`make evidence`: what a run is, that it goes on where it stopped, what it counts and writes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ranks import Pools
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import evidence
from evidence import __main__ as command
from evidence import page, trials
from evidence.budget import OutOfReachError, fields_for, rank_for
from evidence.methods import METHODS, SHIPPED, TABLE, TRIALS
from evidence.plan import (
    BUDGETS,
    MOST_RUNS,
    SEEDS,
    Planned,
    grid,
    plan,
    settled,
    tuned,
)
from evidence.runs import Record, Results, Run
from evidence.tasks import TASKS
from evidence.train import train
from evidence.trials import one_budget, rows_or_columns

import arc_topk
from arc_topk.plan import make_plan

RUN = Run("lm-small", "ARC-Top-K", 0.1, 4, 600, 0, 1e-2, 0.5)


def record(loss: float | None, **fields: Any) -> Record:
    about = dict.fromkeys(("cpu", "isa", "torch", "arc_topk", "python"), "x")
    sizes = {"wire_bytes": 100.0, "link_bytes": 150.0, "dense_bytes": 1000, "seconds": 60.0}
    return {"loss": [[300, 3.0], [600, loss]], **sizes, **about, **fields}


# --- runs and their keys -------------------------------------------------------------------------


def test_every_field_is_part_of_the_key() -> None:
    others = {"task": "digits", "method": "dense", "budget": 0.05, "ranks": 2, "steps": 300,
              "seed": 1, "lr": 2e-2, "beta1": 0.9}  # fmt: skip
    assert others.keys() == {field.name for field in dataclasses.fields(Run)}
    keys = {dataclasses.replace(RUN, **{name: value}).key() for name, value in others.items()}
    assert len(keys | {RUN.key()}) == len(others) + 1


def test_a_changed_method_or_task_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path)
    results.add(RUN, record(1.8))
    assert Results(tmp_path).get(RUN) == record(1.8)
    with monkeypatch.context() as patch:
        bf16 = dataclasses.replace(TABLE["ARC-Top-K, bf16"], name="ARC-Top-K")
        patch.setitem(METHODS, "ARC-Top-K", bf16)
        assert Results(tmp_path).get(RUN) is None
    with monkeypatch.context() as patch:
        wider = dataclasses.replace(TASKS["lm-small"], width=256)
        patch.setitem(TASKS, "lm-small", wider)
        assert Results(tmp_path).get(RUN) is None
    assert Results(tmp_path).get(RUN) is not None


def test_what_is_called_as_shipped_is_what_ships() -> None:
    named, default = arc_topk.Config(**TABLE[SHIPPED].config), arc_topk.Config()
    assert (named.wire_dtype, named.sketch_dtype) == (default.wire, default.sketch)
    assert dataclasses.replace(named, wire_dtype=None, sketch_dtype=None) == default


def test_the_plan_has_each_run_once_and_few_enough() -> None:
    runs = [planned.run for planned in plan()]
    assert len(runs) == len(set(runs))
    assert 200 < len(runs) <= MOST_RUNS
    assert {run.method for run in runs} == METHODS.keys()
    assert {run.task for run in runs} == TASKS.keys()


# --- it goes on where it stopped -----------------------------------------------------------------


def test_a_line_that_a_kill_has_cut_off_is_run_again(tmp_path: Path) -> None:
    results = Results(tmp_path)
    second = dataclasses.replace(RUN, seed=1)
    results.add(RUN, record(1.8))
    results.add(second, record(1.9))
    file = tmp_path / "lm-small.jsonl"
    file.write_bytes(file.read_bytes()[:-20])

    after = Results(tmp_path)
    assert after.get(RUN) is not None and after.get(second) is None
    after.add(second, record(1.7))
    assert len(file.read_text().splitlines()) == 2
    assert Results(tmp_path).get(second) == record(1.7)


class FakeRanks:
    """Counts runs and is killed at one of them."""

    started: ClassVar[list[Run]] = []
    killed_at = -1

    def __init__(self, count: int) -> None:
        self.count = count

    def call(self, body: Callable[[Run], Record], run: Run) -> Record:
        assert body is train and run.ranks == self.count
        self.started.append(run)
        if len(self.started) == self.killed_at:
            raise KeyboardInterrupt
        return record(1.5 + len(self.started) / 100)

    def __enter__(self) -> FakeRanks:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_stopped_plan_goes_on_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Ranks", FakeRanks)
    monkeypatch.setattr(FakeRanks, "started", [])
    monkeypatch.setattr(FakeRanks, "killed_at", 100)
    monkeypatch.setattr(command, "ready", lambda *_: True)
    quiet = Console(quiet=True)
    with pytest.raises(KeyboardInterrupt):
        command.work(plan(), Results(tmp_path), quiet)
    assert len(FakeRanks.started) == 100

    monkeypatch.setattr(FakeRanks, "killed_at", -1)
    command.work(plan(), Results(tmp_path), quiet)
    assert len(FakeRanks.started) == len(plan()) + 1  # the one that was lost is run again
    assert len(set(FakeRanks.started)) == len(plan())
    assert all(run.lr is not None for run in FakeRanks.started)
    command.work(plan(), Results(tmp_path), quiet)
    assert len(FakeRanks.started) == len(plan()) + 1


def test_a_task_whose_packages_are_missing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "Ranks", FakeRanks)
    monkeypatch.setattr(FakeRanks, "started", [])
    monkeypatch.setattr(type(TASKS["digits"]), "needs", ("torch", "no_such_package"))
    some = [planned for planned in plan() if planned.run.task in ("digits", "quadratics")]
    command.work(some, Results(tmp_path), Console())
    assert {run.task for run in FakeRanks.started} == {"quadratics"}
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("digits is left out, without no_such_package: requirements/") == 1


def test_settings_are_the_best_of_the_grid_as_far_as_it_is(tmp_path: Path) -> None:
    results, method = Results(tmp_path), TABLE["ARC-Top-K, bf16"]
    final = Run("lm-small", method.name, 0.1, 4, 600, 0)
    points = grid("lm-small", "ARC-Top-K")
    lrs = TASKS["lm-small"].lrs
    for run in points[: len(lrs) - 1]:
        results.add(run, record(2.0 + abs(run.lr - 1e-2)))
    assert settled(results, final) is None

    results.add(points[len(lrs) - 1], record(None))
    best = tuned(results, "lm-small", method)
    assert best is not None and (best.done, best.points) == (len(lrs), 3 * len(lrs))
    assert best.lr == 1e-2 and not best.edge  # 2e-2 has diverged
    results.add(points[len(lrs)], record(1.0))
    assert settled(results, final) == dataclasses.replace(final, lr=points[len(lrs)].lr, beta1=0.0)
    results.add(points[2], record(0.5))
    assert points[2].lr == max(lrs) and tuned(results, "lm-small", method).edge  # type: ignore


def test_the_command_line_chooses_by_words() -> None:
    def choose(*arguments: str) -> list[Planned]:
        return command.chosen(command.parser().parse_args(arguments))

    some = choose("--task", "lm-small", "--only", "grid", "Top-K", "lr 0.01 ")
    names = {planned.run.method for planned in some}
    assert names == {"ARC-Top-K", "ARC-Top-K, uint8", "ARC-Top-K EF21M", "Top-K"}
    assert {planned.run.lr for planned in some} == {1e-2}
    assert len(choose()) == len(plan())


# --- bytes ---------------------------------------------------------------------------------------


def on_rank(rank: int, ranks: int, run: Run) -> Record:
    return train(run)


ENGINES = [name for name, method in TABLE.items() if method.way == "engine"]


@pytest.mark.parametrize("name", ENGINES)
def test_bytes_are_those_of_the_plan(pools: Pools, name: str) -> None:
    method, steps = TABLE[name], 3
    budget = 0.1 if method.budgeted else None
    run = Run("lm-small", name, budget, 2, steps, 0, 1e-2, 0.5)
    results = pools.of(2).run(on_rank, run)
    assert results[0]["wire_bytes"] == results[1]["wire_bytes"]

    model = TASKS["lm-small"].model()
    chosen = {key: results[0][key] for key in ("ratio", "sketch_dim") if key in results[0]}
    config = arc_topk.Config(**{**method.config, **chosen})
    planned = make_plan(config, model.named_parameters(), 2)
    first = planned.dense_bytes if config.feedback == "ef21m" else planned.wire_bytes
    assert results[0]["wire_bytes"] * steps == first + (steps - 1) * planned.wire_bytes
    assert results[0]["dense_bytes"] == planned.dense_bytes
    assert len(results[0]["loss"]) == 1 and 4 < results[0]["loss"][0][1] < 6


def test_bytes_of_torchs_hooks_and_of_local_sgd_are_counted(pools: Pools) -> None:
    numel = sum(p.numel() for p in TASKS["lm-small"].model().parameters())

    def counted(name: str, budget: float | None, steps: int) -> Record:
        run = Run("lm-small", name, budget, 2, steps, 0, 1e-2, 0.5)
        result: Record = pools.of(2).run(on_rank, run)[0]
        return result

    assert counted("bf16 hook (torch)", None, 2)["wire_bytes"] == 2 * numel
    local = counted("local SGD, H = 8", None, 8)
    assert local["wire_bytes"] == 4 * numel / 8
    assert local["link_bytes"] == local["wire_bytes"]  # 2 ranks: 2 (N-1)/N = 1

    power = counted("PowerSGD (torch)", 0.1, 5)
    tensors = list(TASKS["lm-small"].model().parameters())
    compressed = 0
    for t in tensors:
        m, n = t.shape[0], t.numel() // t.shape[0]
        factors = min(m, n, power["rank"]) * (m + n)
        compressed += 4 * (factors if 2 * factors < m * n else m * n)
    assert power["wire_bytes"] * 5 == 2 * 4 * numel + 3 * compressed
    assert compressed <= 0.1 * 4 * numel


# --- trials --------------------------------------------------------------------------------------


def chosen(rank: int, ranks: int) -> None:
    base = {**TABLE["low rank, uint8"].config, "ratio": 0.05}
    torch.manual_seed(0)
    sparse = torch.zeros(300, 40)  # few rows have it all, and no few columns do
    sparse[::60] = torch.randn(5, 40) * 10
    flat = torch.randn(200, 2) @ torch.randn(2, 200) + 0.01 * torch.randn(200, 200)
    rows, columns, vector = rows_or_columns([sparse, flat, torch.randn(7)], base)
    assert rows["compressor"] == "arc_topk" and columns == vector == base

    # Of two matrices the one that has all the energy gets all columns but one.
    strong, weak = 100 * torch.randn(100, 100), torch.randn(100, 100)
    first, second, last = one_budget([strong, weak, torch.randn(7)], base)
    (before,) = make_plan(arc_topk.Config(**base), [("x", strong)], ranks).rows
    (after,) = make_plan(arc_topk.Config(**first), [("x", strong)], ranks).rows
    assert second["rank"] == 1 and last == base and before.kept is not None
    assert first["rank"] == 2 * before.kept - 1
    assert before.wire_bytes < after.wire_bytes <= 2 * before.wire_bytes


def test_trials_choose_by_energy_within_the_bytes(pools: Pools) -> None:
    pools.of(2).run(chosen)


def looked(rank: int, ranks: int, run: Run) -> Record:
    before, trials.LOOK_AT = trials.LOOK_AT, (1,)
    try:
        return train(run)
    finally:
        trials.LOOK_AT = before


@pytest.mark.parametrize("name", TRIALS)
def test_trials_train_at_low_ranks_bytes(pools: Pools, name: str) -> None:
    run = Run("lm-small", name, 0.025, 2, 3, 0, 1e-2, 0.5)
    one, two = pools.of(2).run(looked, run)
    assert one["wire_bytes"] == two["wire_bytes"] <= 0.025 * one["dense_bytes"]
    assert one["step 1"] == two["step 1"]
    assert any(one["step 1"]["ranks"]) == name.endswith("one budget")
    assert one["loss"] == two["loss"]


@pytest.mark.parametrize("name", [m.name for m in TABLE.values() if m.budgeted])
@pytest.mark.parametrize("ranks", [1, 4])
def test_as_much_of_a_budget_is_used_as_whole_rows_allow(name: str, ranks: int) -> None:
    named = list(TASKS["lm-small"].model().named_parameters())
    tensors = [parameter for _, parameter in named]
    dense = 4 * sum(t.numel() for t in tensors)

    def share(fields: dict[str, Any]) -> float:
        return make_plan(arc_topk.Config(**fields), named, ranks).wire_bytes / dense

    for budget in (0.1, 0.05, 0.025):
        if TABLE[name].way == "powersgd":
            # Of 470,528 elements 3584 are in vectors; the sum of m + n over all matrices is 5056.
            assert rank_for(tensors, budget) == int((budget * 470528 - 3584) / 5056)
            continue
        fields = fields_for(TABLE[name].config, tensors, ranks, budget)
        assert share(fields) <= budget
        assert share({**fields, "ratio": fields["ratio"] + 2e-6}) > budget


def test_budgets_that_are_out_of_reach_say_the_least() -> None:
    tensors = [torch.empty(128, 128), torch.empty(1000)]
    dense = 4 * sum(t.numel() for t in tensors)
    with pytest.raises(OutOfReachError, match=r"the least is \d") as error:
        fields_for(METHODS["ARC-Top-K"].config, tensors, 4, 0.01)
    assert 4000 / dense < error.value.least < 0.08  # the vector, and a sketch
    with pytest.raises(OutOfReachError):
        rank_for(tensors, 0.01)


def test_sketches_leave_two_thirds_of_the_budget_to_the_rows() -> None:
    tensors, dense = [torch.empty(512, 128)], 4 * 512 * 128
    for budget in BUDGETS[:3]:
        fields = fields_for(METHODS["ARC-Top-K"].config, tensors, 4, budget)
        r = fields["sketch_dim"]
        assert r == 4 or 2 * r * 4 * 512 > budget * dense / 3
        assert r == 1 or r * 4 * 512 <= budget * dense / 3
    assert fields_for(METHODS["ARC-Top-K"].config, tensors, 4, 0.1)["sketch_dim"] == 4


# --- the page ------------------------------------------------------------------------------------


def test_the_page_is_written_from_the_results(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    losses = {"dense": (1.70, 1.72, 1.74), "ARC-Top-K": (1.80, 1.83, 1.86)}
    for name, seeds in losses.items():
        for run in grid("lm-small", name):
            best = run.lr == 1e-2 and run.beta1 == 0.5
            results.add(run, record(seeds[0] if best else 2.5))
        for seed, loss in zip(SEEDS[1:], seeds[1:], strict=True):
            budget = 0.1 if TABLE[name].budgeted else None
            results.add(Run("lm-small", name, budget, 4, 600, seed, 1e-2, 0.5), record(loss))
    for run in grid("lm-small", "ARC-Top-K, uint8"):
        results.add(run, record(1.9 if run.lr == 1e-2 and run.beta1 == 0.5 else 2.5))
    uint8 = Run("lm-small", "ARC-Top-K, uint8", 0.006, 4, 600, 0, 1e-2, 0.5)
    results.add(uint8, {"least": 0.0123})
    long = Run("lm-small", "low rank, uint8", 0.025, 4, 3000, 0, 1e-2, 0.5)
    for run in grid("lm-small", "low rank, uint8"):
        results.add(run, record(1.9 if run.lr == 1e-2 and run.beta1 == 0.5 else 2.5))
    results.add(long, record(1.3) | {"residual": [[250, 1.214], [3000, 1.506]]})

    page.write(results, tmp_path)
    text = (tmp_path / "results.md").read_text()
    cells = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    assert ["dense", "", "10.00 %", "10.00 %", "0.01", "0.5", "1.720 +- 0.020", "+0.0 %"] in cells
    arc = ["ARC-Top-K", "10 %", "10.00 %", "10.00 %", "0.01", "0.5", "1.830 +- 0.030", "+6.4 %"]
    assert arc in cells
    assert ["ARC-Top-K, uint8", "0.6 %", "least: 1.23 %", *3 * [""], "out of reach", ""] in cells
    assert ["Rand-K", "10 %", "", "", "", "", "not run", ""] in cells
    assert ["low rank, uint8", "2.5 %", "1.300", "1.21", "1.51"] in cells
    assert f"of {len(plan())} planned runs are done" in text
    assert (tmp_path / "results-lm-small.png").stat().st_size > 1000

    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for block in tables:
        assert len({len(line) for line in block.strip().splitlines()}) == 1, block


def test_an_empty_page_says_so(tmp_path: Path) -> None:
    page.write(Results(tmp_path), tmp_path)
    text = (tmp_path / "results.md").read_text()
    for task in TASKS:
        if not task.startswith("quadratics"):  # feedback.md has theirs
            assert "not run" in text.split(f"## {task}\n")[1].split("\n## ")[0]
    assert f"0 of {len(plan())} planned runs" in text


def test_the_page_on_feedback_keeps_its_words_and_gets_its_tables(tmp_path: Path) -> None:
    words = (evidence.DOCS / "feedback.md").read_text()
    (tmp_path / "feedback.md").write_text(words)
    results = Results(tmp_path)
    for name, loss in (("Top-K EF14", 0.0014), ("ARC-Top-K EF14", 2e-12), ("Rand-K EF21", None)):
        run = Run("quadratics", name, None, 4, 1000, 0, 0.1, 0.0)
        results.add(run, {**record(loss), "loss": [[900, loss], [1000, loss]]})
    for _ in range(2):  # the second time in place of the first
        page.write(results, tmp_path)
    text = (tmp_path / "feedback.md").read_text()
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "| Top-K | 1.4e-03 | not run | not run |" in rows
    assert "| Rand-K | not run | diverged | not run |" in rows
    assert "| ARC-Top-K | 2.0e-12 | not run | not run |" in rows
    assert [line for line in rows if "f / f0, N = 4" in line] == 2 * [
        "| f / f0, N = 4 | EF14 | EF21 | EF21M, eta 0.1 |"
    ]

    def prose(page: str) -> list[str]:
        return [line for line in page.splitlines() if line and not line.startswith("|")]

    assert prose(text) == prose(words)


# --- which feedback ------------------------------------------------------------------------------


def test_why_ef14_and_not_ef21m(pools: Pools) -> None:
    """docs/feedback.md has 1000 steps, and says why: these are still falling here."""

    def loss_after_400_steps(name: str) -> float:
        run = Run("quadratics", name, None, 4, 400, 0, 0.1, 0.0)
        loss: float = pools.of(4).run(on_rank, run)[0]["loss"][-1][1]
        return loss

    assert loss_after_400_steps("Top-K EF14") > 1e-3
    for converging in ("Top-K EF21M", "ARC-Top-K EF14", "ARC-Top-K EF21M"):
        assert loss_after_400_steps(converging) < 1e-5, converging
