"""Selection: sketch -> scores -> top_rows, and what "a valid top K within rounding" means."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sketch(x: Tensor, v: Tensor) -> Tensor:
    """P_i = X_i V / sqrt(r). In expectation over V a row keeps its squared norm.

    Args:
        x: message [m, n].
        v: projection [n, r], float64.

    Returns:
        float64 [m, r].
    """
    return x.double() @ v / math.sqrt(v.shape[1])


def scores(p: Tensor) -> Tensor:
    """score_j = ||P_j||^2 of the mean sketch: [m, r] to [m]."""
    return p.square().sum(dim=1)


def top_rows(values: Tensor, k: int) -> Tensor:
    """The indices of the K largest values, ascending; ties go to the smaller index.

    NaN counts as the largest, as infinity does: both are what a score becomes that overflows.

    Args:
        values: [m], any real or integer type.
        k: K.

    Returns:
        int64 [min(k, m)], ascending.
    """
    ordered = (
        values.nan_to_num(nan=math.inf, posinf=math.inf) if values.is_floating_point() else values
    )
    order = torch.sort(ordered, descending=True, stable=True).indices
    return order[:k].sort().values


def valid_top_k(values: Tensor, rows: Tensor, rtol: float, magnitude: Tensor | None = None) -> bool:
    """Whether `rows` could be the top K of these scores, had they been computed with rounding.

    Sketches that are summed in another order may lead to another choice among nearly equal rows.
    Each score ||P_j||^2 is known to lie between (||P_j|| - d_j)^2 and (||P_j|| + d_j)^2 with
    d_j = rtol * magnitude_j. The choice is valid if no row left out surely beats a row chosen.

    Args:
        values: scores [m], not negative.
        rows: the choice [K].
        rtol: rounding relative to `magnitude`.
        magnitude: [m], size of what was added up to P_j, before anything cancelled; None: of P_j.

    Returns:
        False also where an index is out of range or occurs twice, or the indices do not ascend.
    """
    m, rows = values.numel(), rows.long()
    if rows.numel() and (rows.min() < 0 or rows.max() >= m or (rows[1:] <= rows[:-1]).any()):
        return False
    norm = values.double().sqrt()
    slack = rtol * (norm if magnitude is None else magnitude.double())
    chosen = torch.zeros(m, dtype=torch.bool)
    chosen[rows] = True
    if chosen.all() or not chosen.any():
        return True
    at_most, at_least = norm + slack, norm - slack
    return bool(at_most[chosen].min() >= at_least[~chosen].max())
