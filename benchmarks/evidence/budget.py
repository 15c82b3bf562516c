"""From a share of dense float32's bytes to the ratio, sketch or rank that uses it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import arc_topk
from arc_topk.plan import Plan, make_plan

SKETCH_SHARE = 1 / 3  # of the budget, at most: what is left goes to the rows


class OutOfReachError(ValueError):
    """The least bytes that a method can use are above the budget; ``least`` is their share."""

    def __init__(self, least: float) -> None:
        super().__init__(f"the least is {100 * least:.2f} % of dense bytes")
        self.least = least


def fields_for(
    config: dict[str, Any], tensors: Sequence[Tensor], ranks: int, budget: float
) -> dict[str, Any]:
    """``config`` with the largest ratio whose bytes a step are within the budget.

    ARC-Top-K's sketch dimension is the largest of 4, 2 and 1 whose sketches take at most a third of
    the budget, or 1.

    Args:
        config: fields of `arc_topk.Config` without ``ratio``.
        tensors: the parameters; their shapes count.
        ranks: N.
        budget: share of dense float32's bytes.

    Raises:
        OutOfReachError: the smallest ratio needs more.
    """
    named = [(str(i), tensor) for i, tensor in enumerate(tensors)]
    dense = 4 * sum(tensor.numel() for tensor in tensors)

    def plan_of(fields: dict[str, Any]) -> Plan:
        return make_plan(arc_topk.Config(**fields), named, ranks)

    if config["compressor"] == "arc_topk":
        size = config.get("sketch_dtype", torch.float32).itemsize
        for r in (4, 2, 1):
            config = {**config, "sketch_dim": r}
            rows = plan_of({**config, "ratio": 1e-6}).rows
            if (
                sum(size * r * row.view[0] for row in rows if row.view)
                <= SKETCH_SHARE * budget * dense
            ):
                break

    ratio = _largest(lambda x: plan_of({**config, "ratio": x}).wire_bytes / dense, budget)
    return {**config, "ratio": ratio}


def rank_for(tensors: Sequence[Tensor], budget: float) -> int:
    """PowerSGD's largest rank within the budget: its hook's own rule of what it compresses.

    Raises:
        OutOfReachError: rank 1 needs more.
    """
    dense = sum(tensor.numel() for tensor in tensors)

    def share(rank: int) -> float:
        numel = 0
        for tensor in tensors:
            m = tensor.shape[0]
            n = tensor.numel() // m
            factors = min(m, n, rank) * (m + n)
            numel += factors if 2 * factors < m * n else m * n
        return numel / dense

    if share(1) > budget:
        raise OutOfReachError(share(1))
    return max(rank for rank in range(1, 65) if share(rank) <= budget)


def _largest(share: Callable[[float], float], budget: float) -> float:
    """The largest ratio whose share of bytes, which grows with it, is within the budget."""
    low, high = 1e-6, 1.0
    if share(low) > budget:
        raise OutOfReachError(share(low))
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) <= budget else (low, middle)
    return math.floor(1e6 * low) / 1e6  # rounded up it may keep a row more
