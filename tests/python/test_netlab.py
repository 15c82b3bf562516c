"""The network lab: what ranks find in it, and that nothing is left of it, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from netlab.checked import Link, check  # noqa: E402
from netlab.namespace import LabError  # noqa: E402
from netlab.units import rate, rate_text, seconds, time_text  # noqa: E402
from step_report import table  # noqa: E402

PATIENCE = 60.0  # seconds until processes are gone, on a busy machine
NO_LAB = 2


def lab(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.netlab", "--any-rate", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=300)
    if process.returncode == NO_LAB and "netlab: " in errors:
        pytest.skip(errors.strip())
    return process.returncode, out, errors


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_ranks_reach_one_another(tmp_path: Path) -> None:
    all_reduce = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor([2.0 ** dist.get_rank()])
dist.all_reduce(x)
print(int(x), os.environ["NETLAB"], flush=True)
dist.destroy_process_group()
"""
    status, out, errors = ended(lab("--ranks", "3", "--", script(tmp_path, all_reduce)))
    assert status == 0, errors
    assert out.startswith("7 3 ranks, links without a limit")
    assert "[1] 7" in errors and "[2] 7" in errors


@pytest.mark.parametrize("delay", ["", "15ms"])
def test_a_link_is_as_slow_as_asked_for(delay: str) -> None:
    more = ["--delay", delay] if delay else []
    status, _, errors = ended(lab("--ranks", "2", "--rate", "40mbit", *more))
    assert status == 0
    found = re.search(r"measured ([0-9.]+) Mbit/s\), round trip ([0-9.]+) (us|ms)", errors)
    assert found is not None, errors
    assert float(found[1]) <= 41
    if delay:
        assert found[3] == "ms" and float(found[2]) >= 30


def test_a_rank_that_fails_ends_all_with_its_status(tmp_path: Path) -> None:
    one_fails = "import os, sys, time\nos.environ['RANK'] == '1' and sys.exit(3)\ntime.sleep(600)"
    status, _, _ = ended(lab("--ranks", "3", "--", script(tmp_path, one_fails)))
    assert status == 3


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = task.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            children += [int(task.parent.name), *descendants(int(task.parent.name))]
    return children


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    waits = f"""
import os, pathlib, time
pathlib.Path({str(tmp_path)!r}, "rank" + os.environ["RANK"]).touch()
time.sleep(600)
"""
    process = lab("--ranks", "2", "--delay", "1ms", "--", script(tmp_path, waits))
    while not all((tmp_path / f"rank{rank}").exists() for rank in range(2)):
        if process.poll() is not None:
            status, _, errors = ended(process)
            pytest.fail(f"{status}: {errors}")
        time.sleep(0.05)
    its = descendants(process.pid)
    assert len(its) >= 6  # three namespaces, two ranks, a relay or netem's none
    os.kill(process.pid, how)
    process.wait(PATIENCE)
    end = time.monotonic() + PATIENCE
    while any(map(alive, its)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in its if alive(pid)]
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def test_units_are_read_and_written() -> None:
    assert rate("100mbit") == 1e8 and rate("2.5 Gbit") == 2.5e9
    assert seconds("20ms") == 0.02 and seconds("500us") == 5e-4
    assert rate_text(1e9) == "1 Gbit/s" and rate_text(95.6e6) == "95.6 Mbit/s"
    assert time_text(0.02) == "20 ms" and time_text(12.3e-6) == "12.3 us"
    for wrong in ("1", "gbit", "-1gbit", "0gbit", "1.2.3gbit", "1gb"):
        with pytest.raises(ValueError, match="expected a rate as 100mbit"):
            rate(wrong)


class Asked:
    """Of a `Network`, what was asked for."""

    def __init__(self, rate: float | None, delay: float) -> None:
        self.rate, self.delay = rate, delay


@pytest.mark.parametrize(
    ("asked", "got", "words"),
    [
        (Asked(1e9, 0), Link(0.955e9, 5e-5), ""),
        (Asked(None, 0), Link(1e7, 5e-5), ""),
        (Asked(1e9, 0), Link(0.6e9, 5e-5), "a link of 1 Gbit/s gives 600 Mbit/s"),
        (Asked(1e8, 0), Link(1.2e8, 5e-5), "a link of 100 Mbit/s gives 120 Mbit/s"),
        (Asked(1e8, 0.02), Link(0.95e8, 0.0405), ""),
        (Asked(1e8, 0.02), Link(0.95e8, 0.02), "a delay of 20 ms one way gives a round trip of 20"),
        (Asked(1e8, 0.02), Link(0.95e8, 0.06), "gives a round trip of 60 ms; expected 40 ms"),
    ],
)
def test_another_link_than_asked_for_is_refused(asked: Asked, got: Link, words: str) -> None:
    refused = pytest.raises(LabError, match=words) if words else contextlib.nullcontext()
    with refused:
        check(asked, got)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "0"], "--ranks is 0; expected 1 to 250"),
        (["--rate", "5"], "is '5'; expected a rate as 100mbit, 1gbit"),
        (["--delay", "1gbit"], "expected a time as 500us, 20ms"),
    ],
)
def test_a_wrong_command_line_says_what_is_expected(arguments: list[str], words: str) -> None:
    process = lab(*arguments)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and words in errors


# --- step_time.py --------------------------------------------------------------------------------


def row(method: str, ms: list[float], **more: object) -> dict[str, object]:
    return {
        "method": method, "bucket_mb": 25.0, "ms": ms, "sent": [1e6] * len(ms),
        "cpu_ms": [500.0] * len(ms), "link_bytes": 1e6, "replay_s": 0.1, "ratio": 0.2,
        "numel": 1e6, **more,
    }  # fmt: skip


def test_what_loses_against_plain_averaging_is_red() -> None:
    rows = [
        row("dense", [200.0, 210, 190]),
        row("bf16_hook", [150.0, 150, 150]),
        row("arc_topk", [140.0, 150, 130]),
        row("top_k", [160.0, 160, 160]),
    ]
    link = {"rate": "1gbit", "measured": 1e9, "rows": rows}
    (shown,) = table(link)
    assert [str(r.style) for r in shown.rows] == ["None", "None", "None", "red"]
    cells = [list(column.cells) for column in shown.columns]
    assert cells[1][2] == "140 (130-150)" and cells[2][2] == "-30 %"
    assert (cells[3][2], cells[4][2], cells[5][2]) == ("40", "8", "5.00")
    assert cells[7][2] == "6 %" and cells[8][2] == "0.50"


def test_step_time_measures_replayed_and_real_steps(tmp_path: Path) -> None:
    results, picture = tmp_path / "steps.json", tmp_path / "steps.png"
    command = [
        sys.executable, "benchmarks/step_time.py", "--model", "1m", "--ranks", "2", "--any-rate",
        "--rates", "100mbit", "--replay", "5", "--train", "--tokens", "8", "--rounds", "1",
        "--methods", "dense", "powersgd", "arc_topk_uint8", "top_k",
        "--json", str(results), "--png", str(picture),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode == NO_LAB:
        pytest.skip(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    (link,) = json.loads(results.read_text())["links"]
    methods = ["dense", "powersgd", "arc_topk_uint8", "top_k"]
    assert [r["method"] for r in link["rows"]] == [*methods, "local", *methods]
    sent = {r["method"]: r["sent"][0] for r in link["rows"] if r["replay_s"] == 0.005}
    assert sent["arc_topk_uint8"] < 0.2 * sent["dense"]
    for measured in link["rows"]:
        if measured["replay_s"] is not None:
            assert measured["ms"][0] >= 5
    assert picture.stat().st_size > 1000
