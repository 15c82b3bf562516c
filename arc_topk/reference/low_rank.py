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
from arc_topk.reference.directions import Directions
from arc_topk.reference.levels import RowLevels
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
    x: Sequence[Tensor],
    w: Tensor,
    wire: Wire | Directions,
    sketch: torch.dtype | None = None,
    used: Sequence[bool] | None = None,
) -> tuple[Compressed, Tensor]:
    """Two all-reduces of a factor each.

    (1) P_i = X_i W. (2) All-reduce: P. (3) P^ = orth(P). (4) R_i = X_i^T P^. (5) all-reduce: R,
    their mean. (6) C = P^ R^T, C_i = P^ R_i^T with R_i as sent. The next W is R, with columns of
    unit norm.

    Args:
        x: messages [m, n], one a rank.
        w: W, float32 [n, k], without zero columns.
        wire: what the R_i travel by; `Directions`, the P_i as well.
        sketch: the type that the P_i travel in otherwise; None: the work type, taken for exact.
        used: which ranks' directions count; None: all.

    Returns:
        What was made of the messages, without rows and scores, and the next W.
    """
    work = wire.work
    own_p = [xi.double() @ w.double() for xi in x]
    codec: Wire | RowLevels
    if isinstance(wire, Wire):
        p, codec = mean_of_sketches(own_p, work, sketch or work), wire
    else:
        p, codec = _by_directions(x, own_p, wire, used or [True] * len(x))
    basis = orthonormalise(p.double(), TOLERANCE[work]).to(work).double()
    r = [(xi.double().T @ basis).to(work) for xi in x]
    # What has overflowed is not sent.
    sent = [codec.send(torch.where(ri.isfinite(), ri, 0.0), i) for i, ri in enumerate(r)]
    mean = codec.mean(sent)
    own = [(basis @ codec.value(s).double().T).to(work) for s in sent]
    nothing = torch.empty(0, dtype=torch.int64)
    c = (basis @ mean.double().T).to(work)
    return Compressed(own, c, nothing, nothing), unit_columns(mean.double())


def _by_directions(
    x: Sequence[Tensor], p: Sequence[Tensor], wire: Directions, used: Sequence[bool]
) -> tuple[Tensor, RowLevels]:
    """P, in some unit, and what R travels by. Of a matrix of one row P^ is 1, and R_i is X_i."""
    m, n = x[0].shape
    norms = wire.norms([xi.T for xi in x] if m == 1 else p)
    norms = torch.where(torch.tensor(used)[:, None], norms, 0.0)
    if m == 1:
        return torch.ones(1, 1, dtype=wire.work), wire.unit_of_row(norms, n)
    summed = wire.summed(p, norms)
    return summed, wire.units(norms, summed, n)
