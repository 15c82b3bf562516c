"""Low rank: C = P^ R^T, of two thin factors that are summed on their way; PowerSGD's form.

Source: Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization" (NeurIPS 2019). Unlike there, what rank i has sent is its own part
C_i = P^ R_i^T, with its own R_i as it travelled, and not the mean C: whatever the wire rounds stays
in this rank's residual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arc_topk.reference.compressors import Compressed, mean_of_sketches
from arc_topk.reference.levels import ColumnLevels
from arc_topk.reference.random_numbers import basis_column
from arc_topk.reference.wire import Wire

# What is left of a column, of its length, below which it is nothing but rounding.
TOLERANCE = {torch.float32: 2.0**-20, torch.float64: 2.0**-40}


def orthonormalise(p: Tensor, tolerance: float) -> Tensor:
    """P^ = orth(P): modified Gram-Schmidt, twice.

    Args:
        p: [m, k], float64. A column with an element that is not finite counts as zero.
        tolerance: a column of which no more than this share of its length is left once the columns
            before it are taken out of it (zero, a copy of one of them) becomes zero.

    Returns:
        float64 [m, k]: columns of unit norm that are orthogonal to each other, and zero columns.
    """
    columns: list[Tensor] = []
    for column in p.unbind(1):
        largest = float(column.abs().max()) if len(column) else 0.0
        if not 0 < largest < math.inf:
            columns.append(torch.zeros_like(column))
            continue
        a = column / largest  # or its square may overflow
        length = float(a.norm())
        for _ in range(2):
            for q in columns:
                a = a - (q @ a) * q
            left = float(a.norm())
            a = a / left if left > tolerance * length else torch.zeros_like(a)
            length = 1.0
        columns.append(a)
    return torch.stack(columns, dim=1)


def unit_columns(r: Tensor) -> Tensor:
    """W: the columns of R at unit norm, zero or not finite ones as zero. float64 to float32."""
    largest = r.abs().amax(dim=0)
    usable = largest.isfinite() & (largest > 0)
    scaled = torch.where(usable, r / torch.where(usable, largest, 1.0), 0.0)
    w: Tensor = scaled / scaled.norm(dim=0).clamp_min(1.0)
    return w.float()


def drawn(w: Tensor, seed: int, step: int, stream: int) -> Tensor:
    """W with its zero columns drawn anew: of independent N(0, 1) elements, then of unit norm.

    Args:
        w: [n, k], float32.
        seed: as for `random_numbers.basis_column`.
        step: likewise.
        stream: likewise.
    """
    columns = [
        w[:, c]
        if bool(w[:, c].any())
        else unit_columns(basis_column(seed, step, stream, c, len(w)).unsqueeze(1)).squeeze(1)
        for c in range(w.shape[1])
    ]
    return torch.stack(columns, dim=1)


def low_rank(
    x: Sequence[Tensor], w: Tensor, wire: Wire | ColumnLevels, sketch: torch.dtype | None = None
) -> tuple[Compressed, Tensor]:
    """Two all-reduces of a factor each.

    (1) P_i = X_i W. (2) All-reduce: P. (3) P^ = orth(P). (4) R_i = X_i^T P^. (5) all-reduce: R,
    their mean. (6) C = P^ R^T, C_i = P^ R_i^T with R_i as sent. The next W is R, with columns of
    unit norm.

    Args:
        x: messages [m, n], one a rank.
        w: W, float32 [n, k], without zero columns.
        wire: what the R_i travel by.
        sketch: the type that the P_i travel in; None: the work type, taken for exact.

    Returns:
        What was made of the messages, without rows and scores, and the next W.
    """
    work = wire.work
    own_p = [xi.double() @ w.double() for xi in x]
    p = mean_of_sketches(own_p, work, sketch or work)
    basis = orthonormalise(p, TOLERANCE[work]).to(work).double()
    r = [(xi.double().T @ basis).to(work) for xi in x]
    # What has overflowed is not sent.
    codec = wire.fitted_columns(own_p, p, x[0].shape[1])
    sent = [codec.send(torch.where(ri.isfinite(), ri, 0.0)) for ri in r]
    mean = codec.mean(sent)
    own = [(basis @ codec.value(s).double().T).to(work) for s in sent]
    nothing = torch.empty(0, dtype=torch.int64)
    c = (basis @ mean.double().T).to(work)
    return Compressed(own, c, nothing, nothing), unit_columns(mean.double())
