"""Configurations and tensors by chance, into `Config` and `make_plan`: `make fuzz`, `test_fuzz.py`.

Whatever comes in, a sound configuration and a plan that adds up come out, or an error that names
the field. The same cases in every run: each is seeded by its number.
"""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import torch

import arc_topk
from arc_topk.plan import make_plan

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GOOD: dict[str, list[Any]] = {
    "compressor": ["arc_topk", "dense", "low_rank", "rand_k", "top_k"],
    "feedback": ["ef14", "ef21", "ef21m", "none"],
    "ratio": [1, 0.1, 0.5, 1e-300, 1 - 1e-16],
    "ratios": [None, {"*": 0.3}, {"0": 1, "[12]": 1e-300}],
    "rank": [None, 1, 4, 2**31 - 1],
    "sketch_dim": [1, 4, 64],
    "row_width": [None, 1, 8, 2**31 - 1],
    "eta": [None, 0.1, 1],
    "start_step": [0, 3, 2**62],
    "warmup_steps": [0, 1, 2**31 - 1],
    "warmup": ["exponential", "linear"],
    "wire_dtype": [None, *DTYPES, torch.uint8],
    "sketch_dtype": [None, torch.bfloat16],
    "state_dtype": [None, torch.float32, torch.bfloat16],
    "seed": [0, 2**64 - 1],
    "check_every": [0, 1, 2**62],
    "resync_every": [None, 0, 7, 2**62],
}
STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 0.0, -0.0, 1.5, 2**63, -(2**63), 2**64, 10**400, 1e400, 1e-400),
    *(math.nan, math.inf, -math.inf, 1j, "", "arc_topk", "\0", "ef14", "\udc80", b"x", [], {}, ()),
    *(torch.int8, torch.complex64, torch.float32, object, len, torch.tensor(0.5), torch.zeros(3)),
]


def fields_of(chance: random.Random) -> tuple[dict[str, Any], bool]:
    """Fields, and whether some value may be none of those that are expected."""
    names = [name for name in GOOD if chance.random() < 0.6]
    fields = {name: chance.choice(GOOD[name]) for name in names}
    strange = chance.random() < 0.5
    if strange and names:
        fields[chance.choice(names)] = chance.choice(STRANGE)
    if chance.random() < 0.3:
        fields["ratio"] = chance.random() or 1.0
    return fields, strange


def tensor_of(chance: random.Random) -> torch.Tensor:
    """Without memory: up to 2^40 elements, any order of dimensions, some of no element."""
    sizes = [chance.choice([0, 1, 1, 2, 3, 7, 2 ** chance.randint(0, 12)]) for _ in range(4)]
    sizes = sizes[: chance.randint(0, 4)]
    if chance.random() < 0.1:
        sizes = [2 ** chance.randint(0, 32), 2 ** chance.randint(0, 8)]
    like = torch.empty(sizes, dtype=chance.choice(DTYPES), device="meta")
    return like.permute(chance.sample(range(len(sizes)), len(sizes)))


def check(number: int) -> str:
    """One case: "refused", "too large" or "planned". Raises where anything else happens."""
    chance = random.Random(number)
    fields, strange = fields_of(chance)
    try:
        config = arc_topk.Config(**fields)
    except (ValueError, TypeError) as error:
        text = str(error)
        assert any(name in text for name in fields), (fields, text)
        low_rank = fields.get("compressor") == "low_rank"
        lonely = (
            (fields.get("eta") is not None and fields.get("feedback") != "ef21m")
            or (fields.get("rank") is not None and not low_rank)
            or (fields.get("rank") is not None and bool(fields.get("ratios")))
            or (
                bool(fields.get("warmup_steps"))
                and (fields.get("rank") is not None or fields.get("compressor") == "dense")
            )
            or (low_rank and fields.get("feedback") in ("ef21", "ef21m"))
            or (low_rank and fields.get("wire_dtype") == torch.uint8 and fields.get("sketch_dtype"))
            or (
                (fields.get("wire_dtype") == torch.uint8 or fields.get("sketch_dtype") is not None)
                and fields.get("compressor", "arc_topk") not in ("arc_topk", "low_rank")
            )
        )
        assert strange or lonely, (fields, text)
        return "refused"
    tensors = [(str(i), tensor_of(chance)) for i in range(chance.randint(0, 4))]
    world_size = chance.choice([1, 2, 3, 64, 2**20])
    try:
        plan = make_plan(config, tensors, world_size)
    except ValueError as error:
        text = str(error)
        assert "expected at most" in text, (fields, text)
        return "too large"
    str(plan)
    assert plan.dense_bytes == sum(t.numel() * t.element_size() for _, t in tensors)
    for row, (_, tensor) in zip(plan.rows, tensors, strict=True):
        assert (row.view is None) == (row.kept is None) == bool(row.why_dense), row
        assert row.wire_bytes >= 0 and row.state_bytes >= 0, row
        if row.view is not None and row.kept is not None:
            rows, columns = row.view
            assert 1 <= row.kept <= rows and rows * columns >= tensor.numel(), row
            if config.compressor == "low_rank":
                assert row.kept <= min(columns, config.rank or columns), row
                continue
            assert row.kept == max(1, math.ceil(config.ratio_of(row.name) * rows * (1 - 1e-12))), (
                row
            )
    return "planned"


def main() -> None:
    cases = int(sys.argv[1])
    seen = [check(number) for number in range(cases)]
    counts = {what: seen.count(what) for what in sorted(set(seen))}
    print(f"{cases} configurations, {arc_topk.__file__}: {counts}")
    assert set(counts) == {"refused", "too large", "planned"}


if __name__ == "__main__":
    main()
