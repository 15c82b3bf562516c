"""Golden hashes: the engine still gives the very bits that it gave when golden.json was recorded.

The oracle says whether a result is right, within rounding; a hash says whether it has changed at
all. So this is the net for work that is meant to change nothing: a refactoring, another compiler or
torch, a new SIMD path. Work that is meant to change bits records the hashes again::

    make golden            # or: python tests/python/test_golden.py

which names every case that has changed. Look whether those are the ones that should have, and
commit golden.json with the change. Half a minute, so not a part of `make test`: `make test-slow
ARGS="-k golden"` compares.

One hash should do for all machines: every instruction set is to give the same bits, inputs come
from a generator that is the same everywhere, and two addends have one sum. The order of three is
Gloo's: should another Gloo change that, only cases of 3 ranks differ. Recorded, and so far
compared, on one machine alone: AVX-512, torch 2.15.

No tensor is zero or not finite: those rules have tests of their own. States are not hashed; what
they hold shows in the results of later steps, as far as it is sent by then.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from model import Pick
from ranks import Pools
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import arc_topk

# On a GPU they would be other hashes; `make gpu-check` leaves out what is slow.
pytestmark = [pytest.mark.slow, pytest.mark.device]

FILE = Path(__file__).with_name("golden.json")
WORLD_SIZES = [2, 3]
COMPRESSORS = ["arc_topk", "low_rank", "rand_k", "top_k", "dense"]
FEEDBACKS = ["none", "ef14", "ef21", "ef21m"]
DTYPES = ["float32", "float64", "bfloat16", "float16"]
WIRES = [None, "float32", "bfloat16", "float16"]
STEPS = 5

# In memory order; all in a few buckets, and in others after DDP's rebuild.
LAYOUTS = {
    "mixed": [
        torch.empty(40, 24),
        torch.empty(7),
        torch.empty(96, 1),
        torch.empty(12, 6, 3, 3).to(memory_format=torch.channels_last),
        torch.empty(1),
        torch.empty(33, 70),
        torch.empty(101),
    ],
    # Rows are long, and more than one thread's share, one block's selection or one piece.
    "long": [torch.empty(3, 5000), torch.empty(66000, 2)],
}


@dataclass(frozen=True)
class Case:
    """One training run of STEPS steps: what is configured, and on what."""

    name: str
    config: dict[str, Any]
    dtype: torch.dtype
    layout: str = "mixed"
    ddp: dict[str, Any] = field(default_factory=lambda: {"bucket_cap_mb": 0.004})


def cases(compressor: str) -> list[Case]:
    def case(feedback: str, dtype: str, layout: str = "mixed", **fields: Any) -> Case:
        given = [f"{k} {v}".replace("torch.", "") for k, v in fields.items()]
        name = ", ".join([compressor, feedback, dtype, *given, *[layout] * (layout != "mixed")])
        config = {"compressor": compressor, "feedback": feedback, "ratio": 0.2, "seed": 7,
                  "wire_dtype": getattr(torch, dtype), **fields}  # fmt: skip
        return Case(name, config, getattr(torch, dtype), layout)

    by_bytes = [
        case(feedback, dtype, wire_dtype=torch.uint8, sketch_dtype=sketch)
        for feedback, dtype, sketch in itertools.product(FEEDBACKS, DTYPES, [None, torch.bfloat16])
        if compressor == "arc_topk" or (compressor == "low_rank" and sketch is None)
    ]
    product = [
        case(feedback, dtype, **({} if wire is None else {"wire_dtype": getattr(torch, wire)}))
        for feedback, dtype, wire in itertools.product(FEEDBACKS, DTYPES, WIRES)
        if wire != dtype and (wire is None or compressor != "dense")
    ]
    every = [
        *product,
        *by_bytes,
        case("ef14", "float32", state_dtype=torch.bfloat16),
        case("ef21m", "bfloat16", state_dtype=torch.bfloat16),
        case("ef21m", "float32", eta=0.5, start_step=2),
        case("ef14", "float32", row_width=8, sketch_dim=5),
        case("ef21", "float32", row_width=1000, sketch_dim=64),
        case("ef14", "float32", "long"),
        case("ef21m", "bfloat16", "long"),
    ]
    no_ef21 = compressor == "low_rank"
    return [c for c in every if not (no_ef21 and c.config["feedback"].startswith("ef21"))]


def numbers(count: int, seed: str) -> Tensor:
    """About normal, never zero, and to the bit what any machine makes."""
    generator = random.Random(seed)
    raw = torch.frombuffer(bytearray(generator.randbytes(8 * count)), dtype=torch.int16)
    return (raw.view(count, 4).sum(dim=1, dtype=torch.int64) * 2 + 1).double() / 2**17


def gradients(layout: str, dtype: torch.dtype, rank: int, step: int) -> list[Tensor]:
    """Of one rank in one step: noise, and a part that all ranks share."""
    made = []
    for t, like in enumerate(LAYOUTS[layout]):
        parts = [numbers(like.numel(), f"{layout} {step} {t} {who}") for who in ("all", rank)]
        made.append(torch.empty_like(like, dtype=dtype).copy_(sum(parts).view(like.shape)))
    return made


def hashes(rank: int, world_size: int, chosen: list[Case]) -> dict[str, str]:
    """Of each case: every averaged gradient of every step, as this rank gets it."""
    return {case.name: run(rank, case) for case in chosen}


def run(rank: int, case: Case) -> str:
    digest = hashlib.sha256()
    model = DistributedDataParallel(
        Pick([torch.zeros_like(t, dtype=case.dtype) for t in LAYOUTS[case.layout]]), **case.ddp
    )
    arc_topk.register(model, **case.config)
    for step in range(STEPS):
        model.zero_grad(set_to_none=True)
        model(gradients(case.layout, case.dtype, rank, step)).backward()
        for parameter in model.module.tensors:
            assert parameter.grad is not None
            digest.update(parameter.grad.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def measure(pools: Pools, compressor: str, world_size: int) -> dict[str, str]:
    found, *others = pools.of(world_size).run(hashes, cases(compressor))
    assert all(other == found for other in others), "ranks got different bits"
    return {f"{world_size} ranks, {name}": digest for name, digest in found.items()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_the_bits_are_those_recorded(pools: Pools, compressor: str, world_size: int) -> None:
    recorded = json.loads(FILE.read_text())
    found = measure(pools, compressor, world_size)
    changed = [name for name, digest in found.items() if recorded.get(name) != digest]
    assert not changed, "\n".join(["other bits than recorded (see test_golden.py):", *changed])


def record() -> None:
    old = json.loads(FILE.read_text()) if FILE.exists() else {}
    pools = Pools()
    new: dict[str, str] = {}
    for compressor, world_size in itertools.product(COMPRESSORS, WORLD_SIZES):
        new |= measure(pools, compressor, world_size)
    pools.close()
    FILE.write_text(json.dumps(new, indent=1) + "\n")
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            print("gone:" if name not in new else "changed:" if name in old else "new:", name)
    print(f"{len(new)} cases in {FILE}")


if __name__ == "__main__":
    record()
