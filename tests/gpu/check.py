"""Everything that needs a GPU, in one command and at most 15 minutes: ``make gpu-check``.

Every step runs, whatever became of those before it. A step that this machine cannot do is "not
done", with the reason; the exit status is 0 only if every step was done and passed. The result is
a table (gpu-check.md) and JSON (gpu-check.json) in the folder that OUT names (build/gpu-check),
with a log of each step beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
BUDGET = 900.0  # seconds in all
NO_GPU = "no GPU here (nvidia-smi finds none)"
# What only a GPU can show, the kernels by themselves first.
CUDA_ALONE = ("tests/python/test_cuda_layouts.py", "tests/python/test_cuda.py")
SIZES = (1_000_000, 16_000_000, 64_000_000, 256_000_000)
CPP_TESTS = ("build/bin/arc_topk_tests", "--gtest_brief=1")
CPP_ON_CUDA = "--gtest_filter=*OnAGpu*:*/on_cuda"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass
class Step:
    """One command.

    Attributes:
        name: in the table and of its log.
        command: argument list, run in the repository's root.
        limit: seconds after which it is ended and has failed.
        needs: reason why it cannot be done here, if there is one.
        environment: on top of this process's.
        complaint: what is wrong by its log, though it ended well.
    """

    name: str
    command: Sequence[str]
    limit: float
    needs: Callable[[], str | None] = lambda: None
    environment: dict[str, str] = field(default_factory=dict)
    complaint: Callable[[str], str | None] | None = None


@dataclass
class Outcome:
    """What became of a step: result is "passed", "failed" or "not done"."""

    name: str
    result: str
    seconds: float
    detail: str


def gpu() -> str | None:
    """Name and compute capability of the first GPU, "NVIDIA H200, 9.0"."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def architecture(name: str | None) -> str:
    """What to compile for: the GPU's, else 90."""
    return name.rsplit(",", 1)[1].strip() if name else "90"


def needs_gpu() -> str | None:
    """Why a step that needs a GPU cannot be done."""
    return None if gpu() else NO_GPU


def needs_cpp_tests() -> str | None:
    """Why the C++ tests cannot be run: looked at after the build."""
    missing = "build/bin/arc_topk_tests was not built: GoogleTest is missing, or the build failed"
    return None if (ROOT / "build/bin/arc_topk_tests").exists() else missing


def needs_cpp_tests_on_gpu() -> str | None:
    """Why those of them that run the kernels cannot be run on a GPU."""
    return needs_gpu() or needs_cpp_tests()


def sanitizer() -> str | None:
    """Path of compute-sanitizer."""
    return shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )


def needs_sanitizer() -> str | None:
    """Why compute-sanitizer cannot be run."""
    return needs_gpu() or (
        None if sanitizer() else "no compute-sanitizer, on PATH or in the toolkit"
    )


def steps(out: Path) -> list[Step]:
    """All steps, in order."""
    cuda = {"ARC_TOPK_TEST_DEVICE": "cuda"}
    archs = os.environ.get("ARC_TOPK_CUDA_ARCHS") or architecture(gpu())
    build = {
        "ARC_TOPK_CUDA": "1",
        "ARC_TOPK_CUDA_ARCHS": archs,
        "ARC_TOPK_TESTS": os.environ.get("ARC_TOPK_TESTS", "optional"),
    }
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    train = [PYTHON, "examples/train_ddp.py", "--device", "cuda", "--ranks", "1", "--steps", "10"]
    found = [
        Step(
            "build",
            [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"],
            240,
            environment=build,
        ),
        Step("registers and SASS", [*pytest, "tests/python/test_cuda_build.py"], 60),
        Step("C++ tests", CPP_TESTS, 60, needs_cpp_tests),
        Step("C++ tests on CUDA", [*CPP_TESTS, CPP_ON_CUDA], 60, needs_cpp_tests_on_gpu, cuda),
        Step("Python tests of CUDA alone", [*pytest, *CUDA_ALONE], 240, needs_gpu, cuda),
        Step("example", train, 60, needs_gpu),
    ]
    for dtype in ("float32", "bfloat16"):
        for numel in SIZES:
            name = f"benchmark {numel // 1_000_000} M {dtype}"
            file = out / f"{name.replace(' ', '-')}.json"
            command = [PYTHON, "benchmarks/gpu.py", "--numel", str(numel), "--dtype", dtype]
            found.append(Step(name, [*command, "--json", str(file)], 60, needs_gpu))
    found += [sanitized(tool) for tool in SANITIZERS]
    # The CPU has passed these already, so they come after what only a GPU can show.
    rest = ["tests/python", *(f"--ignore={file}" for file in CUDA_ALONE)]
    both = [*pytest, "-m", "device and not slow", *rest]
    found.append(Step("Python tests on CUDA", both, 300, needs_gpu, cuda))
    return found


def sanitized(tool: str) -> Step:
    """The step of one of compute-sanitizer's tools."""
    # Errors that torch's and NCCL's own look at the machine provokes are not what is asked for.
    options = ["--tool", tool, "--report-api-errors", "no"]
    complaint = None
    if tool == "initcheck":
        # It knows of no write by a kernel it does not look at, so it looks at all of them; and it
        # reports every copy of padding. So what counts is taken from the log, which must be whole.
        options += ["--print-limit", "1000000"]
        complaint = uninitialized_reads
    else:
        # Our kernels alone: the names of all of them hold it.
        options += ["--kernel-name", "kernel_substring=arc_topk", "--error-exitcode", "9"]
    # Memory out of torch's cache holds what others wrote, and goes on behind a tensor's end.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = [sanitizer() or "", *options, PYTHON, "tests/gpu/small.py"]
    name = f"compute-sanitizer {tool}"
    return Step(name, script, 120, needs_sanitizer, uncached, complaint)


def uninitialized_reads(log: str) -> str | None:
    """What initcheck found in our kernels: a report's second line names the kernel, behind "at"."""
    if "ERROR SUMMARY" not in log:
        return "the log has no summary"
    found = re.findall(r"^=+ +at (.*arc_topk.*)$", log, re.MULTILINE)
    return f"{len(found)} reads of memory never written, the first at {found[0]}" if found else None


def run(step: Step, log: Path, left: float) -> Outcome:
    """Runs one step, for at most ``left`` seconds."""
    reason = step.needs()
    if reason is None and left < 1:
        reason = f"the {BUDGET:.0f} seconds were used up"
    if reason is not None:
        return Outcome(step.name, "not done", 0.0, reason)
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | step.environment
    limit = min(step.limit, left)
    start = time.perf_counter()
    with log.open("w") as output:
        status = status_of(step.command, environment, output, limit)
    seconds = time.perf_counter() - start
    if status != 0:
        return Outcome(step.name, "failed", seconds, f"exit status {status}; {last_line(log)}")
    complaint = step.complaint(log.read_text(errors="replace")) if step.complaint else None
    if complaint is not None:
        return Outcome(step.name, "failed", seconds, complaint)
    return Outcome(step.name, "passed", seconds, last_line(log))


def status_of(
    command: Sequence[str], environment: dict[str, str], output: TextIO, limit: float
) -> int | str:
    """A command's exit status, or what became of it. Ended, it takes its ranks along."""
    try:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return str(error)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_line(log: Path) -> str:
    """What a log ends with, short enough for a table."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160].replace("|", "/") if lines else ""


def run_all(todo: Sequence[Step], out: Path, console: Console) -> list[Outcome]:
    """Runs the steps one after the other, never stopping."""
    outcomes = []
    end = time.monotonic() + BUDGET
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        for number, step in enumerate(todo):
            progress.reset(task, description=f"{number + 1}/{len(todo)} {step.name}")
            log = out / f"{number + 1:02}-{step.name.replace(' ', '-').replace('+', 'p')}.log"
            outcomes.append(run(step, log, end - time.monotonic()))
            last = outcomes[-1]
            console.print(f"{last.result:9} {last.seconds:6.1f} s  {last.name}", highlight=False)
    return outcomes


def markdown(outcomes: Sequence[Outcome], machine: dict[str, str]) -> str:
    """The report."""
    lines = [f"GPU: {machine['gpu']}; Python {machine['python']}; {machine['date']}", ""]
    lines += ["| step | result | seconds | |", "|---|---|--:|---|"]
    lines += [f"| {o.name} | {o.result} | {o.seconds:.1f} | {o.detail} |" for o in outcomes]
    missing = [o.name for o in outcomes if o.result == "not done"]
    if missing:
        lines += ["", f"NOT DONE, so nothing is known of: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def report(outcomes: Sequence[Outcome], out: Path, console: Console) -> int:
    """Writes and shows table and JSON; returns the exit status."""
    machine = {
        "gpu": gpu() or "none",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    content = {"machine": machine, "steps": [asdict(o) for o in outcomes]}
    benchmarks = [json.loads(file.read_text()) for file in sorted(out.glob("benchmark-*.json"))]
    text = markdown(outcomes, machine)
    if benchmarks:
        content["benchmarks"] = benchmarks
        text += "\n" + benchmark_table(benchmarks)
    (out / "gpu-check.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "gpu-check.md").write_text(text)
    table = Table(box=None, pad_edge=False)
    for name in ("step", "result", "seconds", ""):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for o in outcomes:
        table.add_row(o.name, o.result, f"{o.seconds:.1f}", escape(o.detail))
    console.print(table)
    missing = [o for o in outcomes if o.result == "not done"]
    failed = [o for o in outcomes if o.result == "failed"]
    passed = len(outcomes) - len(missing) - len(failed)
    console.print(f"{passed} passed, {len(failed)} failed, {len(missing)} not done: {out}")
    return 0 if passed == len(outcomes) else 1


def benchmark_table(benchmarks: Sequence[dict[str, object]]) -> str:
    """Markdown: all numbers of all benchmarks, a line each."""
    names = list(benchmarks[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "--:|" * len(names)]
    for b in benchmarks:
        values = (b.get(name) for name in names)
        cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in values)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--only", metavar="WORD", nargs="+", help="just the steps with one of these in their name"
    )
    p.add_argument("--list", action="store_true", help="name the steps and do nothing")
    args = p.parse_args(arguments)
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
    words = args.only or [""]
    todo = [step for step in steps(out) if any(word in step.name for word in words)]
    console = Console()
    if args.list:
        for step in todo:
            console.print(f"{step.name}: {step.needs() or 'can be done here'}", highlight=False)
        return 0
    if not todo:
        p.error(f"--only is {args.only!r}; expected part of a step's name, see --list")
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("benchmark-*.json"):
        old.unlink()
    return report(run_all(todo, out, console), out, console)


if __name__ == "__main__":
    sys.exit(main())
