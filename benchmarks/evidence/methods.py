"""The table of methods: a line each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

BF16, FP32, UINT8 = torch.bfloat16, torch.float32, torch.uint8


@dataclass(frozen=True)
class Method:
    """One way to average.

    Attributes:
        name: as tables show it.
        way: "engine" (ours), "bf16_hook", "powersgd" (torch's), "local_sgd", "by_matrix" (a trial):
            `averaging.attach`.
        config: fields of `arc_topk.Config`, without those that follow from a budget; and a trial's
            choice.
        tuned_as: the method whose grid decides over lr and beta1; "": it has a grid of its own.
        budgeted: its bytes can be chosen.
        curve: runs at every budget, and not at 10 % alone.
        ranks: runs at 1, 2, 8 and 16 ranks too.
    """

    name: str
    way: str = "engine"
    config: dict[str, Any] = field(default_factory=dict)
    tuned_as: str = ""
    budgeted: bool = True
    curve: bool = False
    ranks: bool = False

    def about(self) -> dict[str, str]:
        """What a run's key holds of it."""
        return {"way": self.way, **{name: str(value) for name, value in self.config.items()}}


def engine(name: str, *, wire: torch.dtype | None = None, **fields: Any) -> Method:
    """One of ours; the fields that are not `Method`'s are `arc_topk.Config`'s.

    ``wire``: rows and second factors travel in it, and the first collective in bfloat16; low rank's
    on bytes is bytes as well.
    """
    own = {
        key: fields.pop(key) for key in ("tuned_as", "budgeted", "curve", "ranks") if key in fields
    }
    config = dict(fields)
    if wire is not None:
        config["wire_dtype"] = wire
        if wire != UINT8 or config["compressor"] != "low_rank":
            config["sketch_dtype"] = BF16
    return Method(name, "engine", config, **own)


SHIPPED = "ARC-Top-K, uint8"  # what `arc_topk.Config()` is, at a ratio by bytes
ARC, LOW_RANK = {"compressor": "arc_topk"}, {"compressor": "low_rank"}
EF14, EF21M = {"feedback": "ef14"}, {"feedback": "ef21m"}
DENSE = {"compressor": "dense", "feedback": "none"}

TABLE = {
    method.name: method
    for method in (
        engine("dense", **DENSE, budgeted=False, ranks=True),
        Method("bf16 hook (torch)", "bf16_hook", tuned_as="dense", budgeted=False),
        engine("low rank, uint8", **LOW_RANK, **EF14, wire=UINT8, curve=True, ranks=True),
        engine("low rank, bf16", **LOW_RANK, **EF14, wire=BF16, tuned_as="low rank, uint8",
               curve=True),
        engine("low rank", **LOW_RANK, **EF14, wire_dtype=FP32, tuned_as="low rank, uint8"),
        engine("ARC-Top-K", **ARC, **EF14, wire_dtype=FP32),
        engine("ARC-Top-K, bf16", **ARC, **EF14, wire=BF16, tuned_as="ARC-Top-K"),
        engine("ARC-Top-K, uint8", **ARC, **EF14, wire=UINT8, curve=True, ranks=True),
        engine("ARC-Top-K, uint8, float32 sketches", **ARC, **EF14, wire_dtype=UINT8,
               tuned_as="ARC-Top-K, uint8"),
        engine("ARC-Top-K EF21M", **ARC, **EF21M, eta=0.3),
        engine("Top-K", compressor="top_k", **EF14, curve=True),
        engine("Rand-K", compressor="rand_k", **EF14),
        Method("PowerSGD (torch)", "powersgd", curve=True),
        Method("local SGD, H = 8", "local_sgd", budgeted=False),
    )
}  # fmt: skip

# What the quadratics compare, at one ratio and one learning rate: no grid.
FEEDBACKS = {
    f"{name} {feedback.upper()}": engine(
        f"{name} {feedback.upper()}", compressor=compressor, feedback=feedback, ratio=0.1,
        wire_dtype=FP32, **({"eta": 0.1} if feedback == "ef21m" else {}), budgeted=False
    )
    for compressor, name in (("top_k", "Top-K"), ("rand_k", "Rand-K"), ("arc_topk", "ARC-Top-K"))
    for feedback in ("ef14", "ef21", "ef21m")
}  # fmt: skip

# Tried on the small language model: trials.py.
TRIALS = {
    f"low rank, uint8: {choice}": Method(
        f"low rank, uint8: {choice}", "by_matrix",
        {**TABLE["low rank, uint8"].config, "choice": choice}, tuned_as="low rank, uint8",
    )
    for choice in ("rows or low rank", "one budget")
}  # fmt: skip

METHODS = {**TABLE, **FEEDBACKS, **TRIALS}
