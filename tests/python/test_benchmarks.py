"""The benchmark runs, writes what it says, and times nothing that computes wrong results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import arc_topk
from arc_topk.plan import make_plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare  # noqa: E402
import contestants  # noqa: E402
import gpu  # noqa: E402
import timing  # noqa: E402
import verification  # noqa: E402
import workload  # noqa: E402
from floor import floor_bytes  # noqa: E402


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "--json", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(file.read_text())
    report["text"] = done.stdout
    return report


def test_tiny_run(tmp_path: Path) -> None:
    sizes = ("--numel", "20000", "--repeat", "3", "--threads", "1")
    report = run(tmp_path, *sizes, "--ratios", "0.2", "--feedback", "ef21m")

    assert {"command", "machine", "settings", "results"} <= report.keys()
    assert {"cpu", "cores", "isa", "torch", "load_average"} <= report["machine"].keys()
    rows = {row["hook"]: row for row in report["results"]}
    assert list(rows) == ["stream", "arc_topk", "rand_k", "top_k", "dense", "python", "powersgd"]
    for row in rows.values():
        assert (row["threads"], row["feedback"], row["ratio"]) == (1, "ef21m", 0.2)
        assert len(row["ms"]["rounds"]) == (18 if row["hook"] == "stream" else 3)
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["hook"] in report["text"]
    for name in ("arc_topk", "rand_k", "top_k"):
        row = rows[name]
        assert set(timing.COMPUTE) < row["phases_ms"].keys()
        assert 0 < row["compute_ms"]["median"] <= row["ms"]["max"]
        assert row["over_floor"]["median"] > 0
        assert row["times_faster_than_python"]["median"] > 0
        assert 0 < row["wire_bytes"] < row["dense_bytes"]


def test_tiny_run_of_two_ranks(tmp_path: Path) -> None:
    report = run(tmp_path, "--ranks", "2", "--numel", "20000", "--repeat", "2", "--ratios", "0.2")
    rows = [row for row in report["results"] if row["feedback"] == "ef14"]
    assert [row["hook"] for row in rows] == ["DDP", *contestants.COMPRESSORS, "python"]
    assert all(row["times_faster_than_DDP"]["median"] > 0 for row in rows[1:])


@pytest.fixture
def small(tmp_path: Path) -> Iterator[workload.Workload]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield workload.Workload(verification.SMALL, torch.float32)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["arc_topk", "rand_k", "top_k", "python"])
@pytest.mark.parametrize("feedback", ["none", "ef14", "ef21", "ef21m"])
def test_verification_notices_wrong_results(
    small: workload.Workload, name: str, feedback: str
) -> None:
    def make(spoil: Any = None) -> contestants.Contestant:
        contestant = contestants.make_contestant(name, small, feedback, 0.2)
        hook = contestant.hook
        if spoil is not None:
            contestant.hook = lambda state, bucket: hook(state, bucket).then(spoil)
        return contestant

    def one_value_too_large(future: torch.futures.Future[Any]) -> torch.Tensor:
        result = contestants.tensor_of(future.value()).clone()
        result[result.abs().argmax()] *= 1.01
        return result

    def everything_kept(future: torch.futures.Future[Any]) -> torch.Tensor:
        return contestants.tensor_of(future.value()) + 1

    verification.verify_kept_rows(make(), small, feedback, 0.2)
    for spoil in (one_value_too_large, everything_kept):
        with pytest.raises(verification.WrongResultError, match=name):
            verification.verify_kept_rows(make(spoil), small, feedback, 0.2)
    if name == "python":
        return
    verification.verify_against_oracle(make(), small)
    with pytest.raises(verification.WrongResultError, match=f"{name}, step 0, tensor"):
        verification.verify_against_oracle(make(one_value_too_large), small)


def test_what_the_gpu_benchmark_does_before_it_times(
    small: workload.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it but CUDA's clock: its verification, and the time of a hook call."""
    gpu.verify(small, "ef21m", 0.2)
    assert 0 < gpu.host_microseconds(30, "cpu", calls=3) < 1e6
    made = contestants.make_contestant

    def spoiled(name: str, *args: Any) -> contestants.Contestant:
        contestant = made(name, *args)
        hook = contestant.hook
        contestant.hook = lambda state, bucket: hook(state, bucket).then(
            lambda future: contestants.tensor_of(future.value()) + 1
        )
        return contestant

    monkeypatch.setattr(gpu, "make_contestant", spoiled)
    with pytest.raises(verification.WrongResultError, match="arc_topk"):
        gpu.verify(small, "ef21m", 0.2)


def test_floor_is_the_documented_formula() -> None:
    """docs/algorithm.md: (4 + 8 rho) 4 d for EF21M and (4 + 4 rho) 4 d for EF14, all in float32."""
    rho, matrix = 0.2, torch.empty(500, 64, device="meta")
    for feedback, kept_factor in (("ef21m", 8), ("ef14", 4)):
        config = arc_topk.Config(feedback=feedback, ratio=rho, wire_dtype=torch.float32)
        floor = floor_bytes(make_plan(config, [("w", matrix)], 1), config)
        assert floor == round((4 + kept_factor * rho) * 4 * matrix.numel())


@pytest.mark.parametrize("model", workload.MODELS)
def test_models_have_the_size_they_say(model: str) -> None:
    numel = sum(torch.Size(shape).numel() for shape in workload.MODELS[model]())
    documented = {"gpt": 41.1e6, "resnet50": 25.6e6, "vit-small": 22.1e6, "mlp": 18.4e6}
    assert numel == pytest.approx(documented[model], rel=0.01)


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--ratios", "0"], ["--repeat", "0"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            compare.parse(arguments)
        assert arguments[0] in capsys.readouterr().err


def test_clipping_prints_every_way() -> None:
    arguments = ("--steps", "4", "--seeds", "1", "--limits", "1", "--feedbacks", "ef14")
    command = [sys.executable, str(BENCHMARKS / "clipping.py"), *arguments]
    wide = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, env=wide)
    assert done.returncode == 0, done.stderr
    for words in ("dense", "EF14", "after", "own norm", "spike limit 3", "given back"):
        assert words in done.stdout
