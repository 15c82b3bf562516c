"""The plan: what is compressed, at what cost."""

from __future__ import annotations

import re

import pytest
import torch

from arc_topk import Config
from arc_topk.plan import make_plan


def row(config: Config, *shape: int, dtype: torch.dtype = torch.float32, world_size: int = 4):
    return make_plan(config, [("w", torch.empty(shape, dtype=dtype))], world_size).rows[0]


def test_bytes_of_a_compressed_matrix() -> None:
    w = row(Config(ratio=0.1), 1000, 256)
    assert (w.view, w.kept, w.wire_dtype) == ((1000, 256), 100, torch.uint8)
    assert w.wire_bytes == 2 * 5 * 1000 + 100 * 256 + 2  # sketch and units, rows, flag
    w = row(Config(ratio=0.1, wire_dtype=torch.float32), 1000, 256)
    assert w.wire_bytes == 4 * 4 * 1000 + 100 * 256 * 4 + 4
    assert w.dense_bytes == 1000 * 256 * 4
    assert w.state_bytes == 1000 * 256 * 4
    assert w.why_dense == ""


def test_bf16_rows_under_an_fp32_sketch() -> None:
    w = row(Config(ratio=0.1, feedback="none"), 1000, 256, dtype=torch.bfloat16)
    assert w.wire_bytes == 4 * 4 * 1000 + 100 * 256 * 2 + 4


def test_top_k_counts_values_indices_and_the_flag() -> None:
    w = row(Config(compressor="top_k", ratio=0.1), 1000, 256)
    assert w.wire_bytes == 25600 * (4 + 4) + 4


def test_vectors_stay_dense_unless_row_width() -> None:
    assert "dimensions" in row(Config(), 1000).why_dense
    assert row(Config(row_width=50), 1000).view == (20, 50)


def test_what_does_not_pay_stays_dense() -> None:
    w = row(
        Config(ratio=0.1, wire_dtype=torch.float32), 4096, 4
    )  # the sketch alone is as large as the matrix
    assert w.view is None and w.kept is None
    assert w.wire_bytes == w.dense_bytes
    assert "compressed bytes" in w.why_dense and "dense" in w.why_dense


@pytest.mark.parametrize("wire", [None, torch.bfloat16, torch.float32])
def test_ratio_1_stays_dense(wire: torch.dtype | None) -> None:
    assert row(Config(ratio=1, wire_dtype=wire), 100, 256).why_dense == "ratio 1"
    assert row(Config(ratios={"w": 1}, wire_dtype=wire), 100, 256).why_dense == "ratio 1"
    low_rank = Config(compressor="low_rank", rank=3, ratio=1, wire_dtype=wire)
    assert row(low_rank, 100, 256).kept == 3


def test_top_k_pays_until_the_ring_carries_more_than_dense_would() -> None:
    # N / 2 * K * (4 + 4) < 4 d: with 4 ranks below ratio 1/4, with 16 below 1/16.
    for world_size, ratio, pays in [
        (4, 0.24, True),
        (4, 0.26, False),
        (16, 0.06, True),
        (16, 0.07, False),
    ]:
        w = row(Config(compressor="top_k", ratio=ratio), 1000, 256, world_size=world_size)
        assert (w.why_dense == "") == pays


def test_channels_last_rows_are_output_channels() -> None:
    weight = torch.empty(64, 32, 3, 3).to(memory_format=torch.channels_last)
    plan = make_plan(Config(), [("conv", weight)], 2)
    assert plan.rows[0].view == (64, 288)


@pytest.mark.parametrize(
    ("rows", "ratio", "kept"), [(100, 0.07, 7), (3, 0.5, 2), (5, 1e-9, 1), (8, 1.0, 8)]
)
def test_kept_rows(rows: int, ratio: float, kept: int) -> None:
    w = row(Config(compressor="rand_k", ratio=ratio), rows, 1000)
    assert (w.kept or rows) == kept


def test_empty_tensors() -> None:
    assert row(Config(), 0, 5).wire_bytes == 0
    assert row(Config(row_width=3), 0).why_dense == "empty"


def test_table() -> None:
    named = [("embed.weight", torch.empty(1000, 64)), ("norm.bias", torch.empty(64))]
    plan = make_plan(Config(), named, 4)
    lines = str(plan).splitlines()
    header = ["parameter", "view", "K", "wire bytes", "dense bytes", "state bytes", "why dense"]
    assert re.split(r"  +", lines[0]) == header
    assert "embed.weight" in lines[1] and "1000 x 64" in lines[1]
    assert "norm.bias" in lines[2]
    assert lines[-1].startswith("total") and f"{plan.wire_bytes:,}" in lines[-1]
    numbers = [f"{n:,}" for n in (*(r.wire_bytes for r in plan.rows), plan.wire_bytes)]
    ends = {line.index(n) + len(n) for line, n in zip(lines[1:], numbers, strict=True)}
    assert len(ends) == 1  # numbers align to the right
