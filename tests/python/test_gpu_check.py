"""`make gpu-check` says what it could not do, never stops early, succeeds only if all passed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import device
import pytest
import torch
from rich.console import Console

import arc_topk
import arc_topk.servable

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import check
import gpu as gpu_benchmark

QUIET = Console(quiet=True)
PASSES = check.Step("passes", [sys.executable, "-c", "print('fine | so far')"], 20)
FAILS = check.Step("fails", [sys.executable, "-c", "raise SystemExit('oh no')"], 20)
HANGS = check.Step("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
ABSENT = check.Step("absent", ["/nowhere/program"], 20)


def test_every_step_runs_and_is_reported(tmp_path: Path) -> None:
    skipped = check.Step("skipped", ["false"], 20, lambda: check.NO_GPU)
    outcomes = check.run_all([FAILS, skipped, HANGS, ABSENT, PASSES], tmp_path, QUIET)
    results = [o.result for o in outcomes]
    assert results == ["failed", "not done", "failed", "failed", "passed"]
    assert outcomes[0].detail == "exit status 1; oh no"
    assert "ended after" in outcomes[2].detail
    assert check.report(outcomes, tmp_path, QUIET) == 1
    text = (tmp_path / "gpu-check.md").read_text()
    assert f"| skipped | not done | 0.0 | {check.NO_GPU} |" in text
    assert "NOT DONE, so nothing is known of: skipped." in text
    assert "fine / so far" in text
    steps = json.loads((tmp_path / "gpu-check.json").read_text())["steps"]
    assert [s["result"] for s in steps] == results


def test_a_step_that_is_ended_takes_along_what_it_started(tmp_path: Path) -> None:
    child = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    step = check.Step("starts", [sys.executable, "-c", f"{child}; time.sleep(600)"], 20)
    assert check.run(step, tmp_path / "log", 20).result == "failed"
    started = int((tmp_path / "log").read_text())
    # Ended, but it goes in its own time; then whoever adopted it has to ask after it.
    deadline = time.monotonic() + 60
    while is_running(started):
        assert time.monotonic() < deadline, f"process {started} is still running"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_passed_is_success_and_one_not_done_is_not(tmp_path: Path) -> None:
    done = check.run_all([PASSES], tmp_path, QUIET)
    assert check.report(done, tmp_path, QUIET) == 0
    late = check.run(PASSES, tmp_path / "log", 0.0)
    assert (late.result, "used up" in late.detail) == ("not done", True)
    assert check.report([*done, late], tmp_path, QUIET) == 1


def test_without_a_gpu_what_needs_one_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "gpu", lambda: None)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    names = [s.name for s in check.steps(tmp_path) if s.needs() == check.NO_GPU]
    assert len(names) == 4 + len(check.SANITIZERS) + 2 * len(check.SIZES)
    assert check.main(["--only", "sanitizer"]) == 1
    text = (tmp_path / "out" / "gpu-check.md").read_text()
    assert text.count(check.NO_GPU) == len(check.SANITIZERS)


def test_sanitizers_look_at_our_kernels_and_at_memory_that_is_not_cached(tmp_path: Path) -> None:
    found = [s for s in check.steps(tmp_path) if "sanitizer" in s.name]
    assert len(found) == len(check.SANITIZERS)
    for step in found:
        of_all = "initcheck" in step.name  # which must see who writes what our kernels read
        assert ("kernel_substring=arc_topk" in step.command) == (not of_all)
        assert step.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


COPY = """========= Host API memory access error at host access to 0x7f00 of size 20 bytes
=========     Uninitialized access to 0x7f00 on access by cudaMemcpy source
"""
READ = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void {}::Pack<float>::run(Bucket)+0x250 in pack.h:31
=========     by thread (0,0,0) in block (0,0,0)
"""
END = "========= ERROR SUMMARY: 3 errors\n"


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        (COPY + READ.format("ncclKernel") + END, None),
        (COPY, "the log has no summary"),
        (
            COPY + READ.format("arc_topk::cuda") * 2 + END,
            "2 reads of memory never written, the first at void arc_topk::cuda::Pack<float>"
            "::run(Bucket)+0x250 in pack.h:31",
        ),
    ],
)
def test_initcheck_counts_what_our_kernels_read(
    tmp_path: Path, log: str, complaint: str | None
) -> None:
    assert check.uninitialized_reads(log) == complaint
    command = [sys.executable, "-c", f"print({log!r})"]
    step = check.Step("initcheck", command, 20, complaint=check.uninitialized_reads)
    outcome = check.run(step, tmp_path / "log", 20)
    assert outcome.result == ("failed" if complaint else "passed")
    assert complaint is None or outcome.detail == complaint


def test_compiles_for_the_gpu_that_is_there() -> None:
    assert check.architecture("NVIDIA H200, 9.0") == "9.0"
    assert check.architecture(None) == "90"


@pytest.mark.skipif(check.needs_cpp_tests() is not None, reason="no C++ tests here")
def test_the_filter_of_the_cpp_tests_on_cuda_finds_them() -> None:
    # A filter that matches nothing would pass.
    command = [check.CPP_TESTS[0], check.CPP_ON_CUDA, "--gtest_list_tests"]
    environment = {**os.environ, "ARC_TOPK_TEST_DEVICE": "cuda"}
    done = subprocess.run(
        command, cwd=check.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "AreTestedWhereAskedFor" in done.stdout
    assert "AStepIsTheCpus/on_cuda" in done.stdout
    assert done.stdout.count("/on_cuda") == 15
    assert "/on_host" not in done.stdout


def test_every_module_that_uses_the_device_is_run_on_cuda(tmp_path: Path) -> None:
    using = re.compile(r"^from (device|model) import", re.M)
    unmarked = [
        file.name
        for file in Path(__file__).parent.glob("test_*.py")
        if using.search(text := file.read_text()) and "pytest.mark.device" not in text
    ]
    assert unmarked == []
    alone, rest = (s for s in check.steps(tmp_path) if s.name.startswith("Python tests"))
    for file in check.CUDA_ALONE:
        assert file in alone.command and f"--ignore={file}" in rest.command
    assert "device and not slow" in rest.command
    for step in (alone, rest):
        assert step.environment == {"ARC_TOPK_TEST_DEVICE": "cuda"}


@pytest.mark.parametrize(
    ("asked_for", "gpu", "kernels", "reason"),
    [
        ("cpu", False, None, None),
        ("cuda", True, {}, None),
        ("cuda", False, {}, "torch finds no GPU"),
        ("cuda", True, None, "this build has no CUDA kernels"),
        ("tpu", True, {}, "ARC_TOPK_TEST_DEVICE is 'tpu'; expected cpu or cuda"),
    ],
)
def test_a_device_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch,
    asked_for: str,
    gpu: bool,
    kernels: dict[str, Any] | None,
    reason: str | None,
) -> None:
    monkeypatch.setattr(device, "DEVICE", asked_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(arc_topk, "build_info", lambda: {"cuda": kernels})
    found = device.why_unusable()
    assert found is None if reason is None else reason in str(found)


def test_the_benchmark_times_nothing_but_nccl() -> None:
    gpu_benchmark.require_nccl("top_k", {"transport": "nccl2"})
    with pytest.raises(RuntimeError, match="top_k exchanges by 'gloo'; expected NCCL"):
        gpu_benchmark.require_nccl("top_k", {"transport": "gloo"})


@pytest.mark.parametrize("why", ["", "its driver is older than the CUDA toolkit"])
def test_a_gpu_that_cannot_run_the_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    asked = []
    monkeypatch.setattr(arc_topk._C, "build_info", lambda: {"cuda": {}})
    monkeypatch.setattr(arc_topk._C, "why_unusable", lambda index: asked.append(index) or why)
    error = arc_topk.servable._unservable_device("parameter 'w'", torch.device("cuda", 3))
    assert asked == [3]
    assert (
        str(error) == f"parameter 'w' is on a GPU that cannot be used, 'cuda:3': {why}"
        if why
        else error is None
    )
