"""examples/train_ddp.py: its parts, a run by itself and by torchrun, resume, and the demo."""

import argparse
import csv
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import RankError, Ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))

if os.environ.get("ARC_TOPK_TESTS") != "required":
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")

import train_ddp  # noqa: E402
from text import Windows, load  # noqa: E402
from transformer import ByteTransformer  # noqa: E402

SMALL = ("--steps=4", "--warmup=2", "--width=32", "--layers=1", "--validation-windows=64")


def options(*flags: str) -> argparse.Namespace:
    return train_ddp.parser().parse_args([*SMALL, *flags])


def command(*flags: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / "train_ddp.py"), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def trained(rank: int, world_size: int, run: argparse.Namespace) -> float:
    """Trains in a rank of the pool; returns the last validation loss."""
    return train_ddp.train(run).validation[-1][1]


def differing_parameters(rank: int, world_size: int) -> None:
    from launch import check_same_parameters

    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(-0.0 if rank == 1 else 0.0)  # equal numbers, other bits
    check_same_parameters(model)


def wrong_bytes(rank: int, world_size: int) -> None:
    import demo

    never = argparse.Namespace(resync_every=0, resync_bytes=0)
    every_second = argparse.Namespace(resync_every=2, resync_bytes=50)
    plan = argparse.Namespace(wire_bytes=100, dense_bytes=1000, rows=(never, every_second))
    way = demo.Way("EF21M", "arc_topk", "ef21m", 0.0, 1e-3)
    sent = 1000 + 2 * 100 + 50
    demo.check_bytes(way, train_ddp.Outcome(3, [], 1.0, plan, {"wire_bytes": sent}))
    demo.check_bytes(way, train_ddp.Outcome(3, [], 1.0, plan, {"wire_bytes": sent + rank}))


def test_help_says_what_must_stay_and_what_the_bytes_are() -> None:
    text = " ".join(train_ddp.parser().format_help().split())
    assert "--feedback must be the same" in text
    assert "2 (N-1)/N B" in text


def test_the_difference_to_plain_ddp_is_two_lines() -> None:
    lines = (EXAMPLES / "train_ddp.py").read_text().splitlines()
    marked = [line for line in lines if "# <- arc_topk" in line and "``" not in line]
    assert [line.split("  #")[0].strip() for line in marked] == [
        "import arc_topk",
        "state = arc_topk.register(ddp, **compression(options))",
    ]


def test_windows_deal_out_every_window_once_an_epoch() -> None:
    text = torch.arange(240, dtype=torch.uint8)  # 24 windows of 10 bytes
    ranks = [Windows(text, 9, 3, rank, 2, seed=5) for rank in range(2)]
    for _ in range(2):  # epochs
        dealt = torch.cat([data.next() for _ in range(4) for data in ranks])
        assert sorted(dealt[:, 0].tolist()) == list(range(0, 240, 10))
    assert ranks[0].position == 48


def test_windows_go_on_from_their_position_with_another_number_of_ranks() -> None:
    text = torch.randint(256, (1000,), dtype=torch.uint8)
    one = Windows(text, 9, 4, 0, 1, seed=5)
    one.next()
    two = [Windows(text, 9, 2, rank, 2, seed=5, position=one.position) for rank in range(2)]
    assert torch.equal(one.next(), torch.cat([data.next() for data in two]))


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 windows of 10 bytes.* needs 4"):
        Windows(torch.zeros(39, dtype=torch.uint8), 9, 2, 0, 2, seed=0)


def test_the_standard_library_is_text_enough() -> None:
    training, validation = load(None)
    assert len(training) > 3_000_000
    assert len(validation) == (len(training) + len(validation)) // 10


def test_the_model_starts_near_a_uniform_guess_and_sees_no_future() -> None:
    torch.manual_seed(0)
    model = ByteTransformer(context=16, width=32, layers=2, heads=4)
    text = torch.randint(256, (2, 17))
    assert model(text).item() == pytest.approx(math.log(256), abs=0.5)
    changed = text.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    losses = [torch.stack([model(t[:, : n + 2]) for n in range(15)]) for t in (text, changed)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="width=30 and heads=4"):
        ByteTransformer(16, 30, 1, 4)


def test_the_schedule_rises_then_falls_to_zero() -> None:
    rates = [train_ddp.warmup_cosine(step, 4, 20) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert rates[20] == 0.0


# With two ranks the order of summation cannot differ: training must go on bit for bit.
@pytest.mark.parametrize(
    "compression",
    [("--compressor=dense", "--feedback=none"), ("--feedback=ef14",), ("--feedback=ef21m",)],
)
def test_a_resumed_run_ends_where_a_whole_one_does(
    ranks: Ranks, tmp_path: Path, compression: tuple[str, ...]
) -> None:
    flags = (*compression, "--dropout=0.1", "--betas", "0.9", "0.99")
    whole = options(*flags, f"--checkpoint={tmp_path}/whole-{{step}}.pt", "--save-every=2")
    resumed = options(
        *flags, f"--resume={tmp_path}/whole-2.pt", f"--checkpoint={tmp_path}/resumed.pt"
    )
    assert ranks.run(trained, whole) == ranks.run(trained, resumed)
    ends = [torch.load(tmp_path / f, weights_only=True) for f in ("whole-4.pt", "resumed.pt")]
    assert ends[0]["step"] == ends[1]["step"] == 4
    assert ends[0]["position"] == ends[1]["position"]
    torch.testing.assert_close(ends[0]["model"], ends[1]["model"], rtol=0, atol=0)
    torch.testing.assert_close(ends[0]["optimizer"], ends[1]["optimizer"], rtol=0, atol=0)
    for part in ("own", "shared"):
        torch.testing.assert_close(*(e["error_feedback"][part] for e in ends), rtol=0, atol=0)


def test_another_feedback_cannot_go_on(ranks: Ranks, tmp_path: Path) -> None:
    file = f"{tmp_path}/run.pt"
    ranks.run(trained, options(f"--checkpoint={file}"))
    with pytest.raises(RankError, match="of feedback='ef14', this State of feedback='ef21'"):
        ranks.run(trained, options(f"--resume={file}", "--steps=6", "--feedback=ef21"))


def test_every_run_ends_with_a_comparison_of_the_ranks(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"parameter bias of ranks \[1\] differs"):
        ranks.run(differing_parameters)


def test_the_demo_compares_measured_bytes_with_the_plan(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 1 sent 1251 bytes in 3 .* says 1250"):
        ranks.run(wrong_bytes)


def test_torchrun_trains_on_a_file_and_logs(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 2000)
    log = tmp_path / "log.csv"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = command(*SMALL, f"--data={text}", f"--csv={log}", launcher=launcher)
    assert done.returncode == 0, done.stderr
    with log.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["validation_loss"]) < float(rows[0]["loss"])
    assert int(rows[1]["wire_bytes"]) == 2 * int(rows[0]["wire_bytes"]) > 0


def test_the_demo_of_a_few_steps(tmp_path: Path) -> None:
    done = command("--demo", "--quick", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    wire = {result["name"]: result["wire_bytes"] for result in content["results"]}
    in_float32 = ("Rand-K EF14", "ARC-Top-K EF14, float32", "Top-K EF14", "dense")
    assert sorted(in_float32, key=wire.__getitem__) == list(in_float32)
    assert max(wire["ARC-Top-K EF14"], wire["low rank EF14"]) < wire["Rand-K EF14"]
    assert (tmp_path / "results.md").read_text().count("\n| ARC-Top-K") == 3
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
