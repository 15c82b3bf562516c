"""Damaged checkpoints by chance, into `load` and `load_state_dict`: `make fuzz`, `test_fuzz.py`.

Whatever comes in, it is loaded or refused with a ValueError, and refused it changes nothing. The
same cases in every run: each is seeded by its number.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import arc_topk

STRANGE: list[Any] = [
    *(None, True, 0, -1, 1.5, 2**63, 2**64, math.nan, "", "rank_0", "ef21", b"x", [], [[]], {}),
    *({"": {}}, {1: 2}, torch.zeros(()), torch.zeros(3), torch.zeros(7, 5, dtype=torch.int32)),
    *(
        torch.full((7, 5), math.nan),
        torch.zeros(7, 5).to_sparse(),
        torch.zeros(7, 5, device="meta"),
    ),
]


class Target:
    """A GradientExchange of one rank, with its checkpoint as a dict and as a file."""

    def __init__(self, folder: Path, feedback: str) -> None:
        tensors = [torch.randn(7, 5), torch.randn(16, 4), torch.randn(3)]
        self.exchange = arc_topk.GradientExchange(tensors, feedback=feedback, ratio=0.2)
        self.exchange.all_reduce_([t.clone() for t in tensors])
        self.folder = folder / feedback
        self.exchange.save(self.folder)
        (self.file,) = self.folder.glob("arc_topk-*.pt")
        self.bytes = self.file.read_bytes()
        self.good = self.exchange.state_dict()
        self.text = self.contents()

    def contents(self) -> str:
        """All that is in it."""
        now = self.exchange.state_dict()
        return str({**now, "meta": {**json.loads(now["meta"]), "id": ""}})


def damaged_bytes(chance: random.Random, good: bytes) -> bytes:
    data = bytearray(good)
    kind = chance.randrange(4)
    if kind == 0:
        return bytes(data[: chance.randrange(len(data))])
    if kind == 1:
        return chance.randbytes(chance.randrange(200))
    for _ in range(1 if kind == 2 else chance.randint(1, 200)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def damaged_dict(chance: random.Random, good: dict[str, Any]) -> Any:
    """One key of one level, in the dict or in its JSON, is gone, moved or strange."""
    state_dict = copy.deepcopy(good)
    in_meta = chance.random() < 0.5
    where = json.loads(state_dict["meta"]) if in_meta else state_dict
    meta = where
    while True:
        key = chance.choice(list(where))
        deeper = isinstance(where[key], dict) and where[key] and chance.random() < 0.7
        if not deeper:
            break
        where = where[key]
    what = chance.randrange(3)
    if what == 0:
        del where[key]
    elif what == 1:
        where[chance.choice(["other", "rank_1", "tensor 9", "c"])] = where.pop(key)
    else:
        where[key] = chance.choice(STRANGE)
    if in_meta:
        text = json.dumps(meta, default=str, skipkeys=True)
        state_dict["meta"] = text if chance.random() < 0.8 else text[: chance.randrange(len(text))]
    return state_dict


def check(number: int, target: Target) -> str:
    """One case: "refused" or "loaded". Raises where anything else happens."""
    chance = random.Random(number)
    refusal = ""
    try:
        if chance.random() < 0.5:
            target.file.write_bytes(damaged_bytes(chance, target.bytes))
            target.exchange.load(target.folder)
        else:
            target.exchange.load_state_dict(damaged_dict(chance, target.good))
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "arc_topk: " in refusal, refusal
        assert target.contents() == target.text, (number, "something has changed")
        return "refused"
    # What was changed has not mattered, or is another State's; a step must go through.
    target.exchange.all_reduce_([torch.randn(7, 5), torch.randn(16, 4), torch.randn(3)])
    target.exchange.load_state_dict(target.good)
    assert target.contents() == target.text, (number, "the good one is not what it was")
    return "loaded"


def check_all(cases: int) -> dict[str, int]:
    """Counts of what became of so many cases."""
    with tempfile.TemporaryDirectory() as folder:
        alone = not dist.is_initialized()
        if alone:
            dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=0, world_size=1)
        torch.manual_seed(0)
        targets = [Target(Path(folder), feedback) for feedback in ("ef14", "ef21m")]
        seen = [check(number, targets[number % 2]) for number in range(cases)]
        del targets
        if alone:
            dist.destroy_process_group()
    return {what: seen.count(what) for what in ("loaded", "refused")}


def main() -> None:
    counts = check_all(int(sys.argv[1]))
    print(f"{sum(counts.values())} checkpoints, {arc_topk.__file__}: {counts}")
    assert all(counts.values())


if __name__ == "__main__":
    main()
