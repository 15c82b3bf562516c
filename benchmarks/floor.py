"""The floor under a hook's compute: the least bytes its equations allow, at measured bandwidth."""

from __future__ import annotations

import time

import torch

from arc_topk import Config, Plan
from arc_topk.plan import PlanRow

# Bytes that error feedback cannot do without, as multiples of (gradient's bytes, state's bytes):
# first for each element, then for each kept one on top, where writing and reading the payload comes
# too.
#
#   none:  g is sketched, the result written; kept rows are read again.
#   ef14:  g is read, e read and written, the result written; kept rows of e are read and cleared.
#   ef21:  g and h_i are read; for kept rows once more, with h_i written and h read and written.
#   ef21m: g, t and h_i are read, t written; for kept rows t, h_i and h are read and written. The
#          shared estimate h is the result as it lies.
TRAFFIC = {
    "none": ((2, 0), (1, 0)),
    "ef14": ((2, 2), (0, 2)),
    "ef21": ((1, 1), (1, 4)),
    "ef21m": ((1, 3), (0, 6)),
}


def floor_bytes(plan: Plan, config: Config) -> int:
    """Bytes that the compute of one compressed step must move, collectives apart.

    With float32 throughout and K = rho m, (4 + 8 rho) 4 d for EF21M and (4 + 4 rho) 4 d for EF14.
    Sketches, scores and V are left out. Rand-K and Top-K are charged what ARC-Top-K is, Top-K for
    its indices besides: no message can be formed without the pass over the gradient.

    Args:
        plan: of the tensors.
        config: its feedback, compressor and types count.

    Returns:
        Bytes. For the compressor "dense", which computes nothing, 0.
    """
    if config.compressor == "dense":
        return 0
    total = 0
    for row in plan.rows:
        gradient = row.dtype.itemsize
        state = 8 if row.dtype == torch.float64 else (config.state_dtype or torch.float32).itemsize
        wire = row.wire_dtype.itemsize
        numel = row.dense_bytes // gradient
        each, kept = TRAFFIC[config.feedback]
        if row.view is None or row.kept is None:  # g into a payload, the mean out of it
            total += numel * 4 * gradient
            continue
        if config.compressor == "low_rank":
            total += low_rank_bytes(row, gradient, state if config.feedback == "ef14" else 0, wire)
            continue
        index = 4 if config.compressor == "top_k" else 0
        total += numel * (each[0] * gradient + each[1] * state)
        total += (
            row.kept * row.view[1] * (kept[0] * gradient + kept[1] * state + 2 * (wire + index))
        )
        if config.feedback in ("ef21", "ef21m") and state != gradient:
            total += numel * (state + gradient)  # the estimate, converted into DDP's bucket
    return total


def low_rank_bytes(row: PlanRow, gradient: int, state: int, wire: int) -> int:
    """Of one matrix under EF14; without feedback (no state) the gradient is read twice.

    g is read, X_i read and written while the residual is formed and multiplied with W; X_i is read
    for X_i^T P^; the result is written. P is written, read, and P^ written and read three times
    (with X_i, with R, and for the residual); R_i and R are written and read, R_i and W once more.
    """
    assert row.view is not None and row.kept is not None
    m, n = row.view
    work = 8 if row.dtype == torch.float64 else 4
    factors = row.kept * (6 * work * m + 2 * wire * n + 6 * work * n)
    numel = row.dense_bytes // gradient
    each = 2 * gradient + 3 * state if state else 3 * gradient
    return numel * each + factors


class Stream:
    """A plain streaming update, c += a b in float32: three arrays read, one of them written.

    Args:
        numel: elements of each array; as many as the hook's gradients have.
    """

    def __init__(self, numel: int) -> None:
        self._a, self._b, self._c = (torch.full((numel,), 1e-3) for _ in range(3))
        self._bytes = 4 * 4 * numel

    def bandwidth(self) -> float:
        """Bytes a second of one update, on as many threads as torch uses."""
        start = time.perf_counter()
        self._c.addcmul_(self._a, self._b)
        return self._bytes / (time.perf_counter() - start)
