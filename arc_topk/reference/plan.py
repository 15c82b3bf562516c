"""The plan: which tensor is seen as which matrix, and which one stays dense."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from arc_topk.reference.layout import memory_order


@dataclass(frozen=True)
class View:
    """One tensor as the algorithm sees it.

    Attributes:
        m, n: rows and columns; the last row may be short of n elements.
        k: K, rows kept; low rank: columns of its factors.
        numel: d <= m n.
        compressed: False: stays dense.
        wire_bytes: what a rank hands to the collectives for it, its flag included.
    """

    m: int
    n: int
    k: int
    numel: int
    compressed: bool
    wire_bytes: int

    def matrix(self, flat: Tensor) -> Tensor:
        """[d] to [m, n], the last row filled up with zeros."""
        return torch.nn.functional.pad(flat, (0, self.m * self.n - self.numel)).view(self.m, self.n)

    def flat(self, matrix: Tensor) -> Tensor:
        """[m, n] to [d]."""
        return matrix.reshape(-1)[: self.numel]


@dataclass(frozen=True)
class Types:
    """The types that follow from the gradient's, the wire's and the state's.

    Attributes:
        gradient: of the gradients, and of what DDP gets.
        work: of arithmetic, sketches and scores: float32, float64 for float64.
        wire: of the rows; the gradient's unless told otherwise.
        sketch: of the first collective; the work type unless told otherwise; of low rank on an
            uint8 wire uint8.
        state: of the error feedback; the work type unless told otherwise, always for float64.
        dense: of a dense tensor on the wire. It has no state to keep what rounding takes away, so
            it is the gradient's type where one of the collectives has that, else the sketch's, or
            the wire's where the sketch's is narrowed below that.
            Rand-K has one payload, hence one type: the wire's.
    """

    gradient: torch.dtype
    work: torch.dtype
    wire: torch.dtype
    sketch: torch.dtype
    state: torch.dtype
    dense: torch.dtype

    @classmethod
    def of(
        cls,
        gradient: torch.dtype,
        wire: torch.dtype | None = None,
        state: torch.dtype | None = None,
        compressor: str = "arc_topk",
        sketch: torch.dtype | None = None,
    ) -> Types:
        """From the gradient's type, those that may be chosen, and the compressor."""
        work = torch.float64 if gradient == torch.float64 else torch.float32
        wire = gradient if wire is None else wire
        state = work if state is None or work == torch.float64 else state
        sketch = work if sketch is None else sketch
        narrowed = sketch not in (work, gradient) and wire.itemsize > sketch.itemsize
        dense = gradient if wire == gradient else wire if narrowed else sketch
        dense = wire if compressor == "rand_k" else dense
        return cls(gradient, work, wire, sketch, state, dense)


def matrix_shape(layout: Tensor, row_width: int | None) -> tuple[int, int] | None:
    """Rows and columns of the matrix view, None where there is none.

    Natural rows (`row_width` None): the dimension of largest stride against the rest. Otherwise
    consecutive runs of `row_width` elements in memory, the last one possibly short, and none wider
    than the tensor is long.
    """
    if row_width is not None:
        width = max(1, min(row_width, layout.numel()))
        return math.ceil(layout.numel() / width), width
    if layout.dim() < 2:
        return None
    m = layout.shape[memory_order(layout)[0]]
    return m, layout.numel() // max(m, 1)


def kept(ratio: float, m: int) -> int:
    """K = ceil(ratio m), at least 1; 0.07 * 100 counts as 7, not as 7.000000000000001."""
    return max(1, math.ceil(ratio * m * (1 - 1e-12)))


def column_bytes(m: int, n: int, types: Types, world_size: int) -> int:
    """Of a column of both of low rank's factors; on bytes, two of norms a rank besides.

    A matrix of one row has no first factor there.
    """
    if types.sketch == torch.uint8:
        return (m if m > 1 else 0) + n + 2 * world_size
    return m * types.sketch.itemsize + n * types.wire.itemsize


def rank_of(
    m: int, n: int, numel: int, types: Types, world_size: int, ratio: float, rank: int | None
) -> int:
    """K of low rank: as asked for, or the most whose factors are `ratio` of the gradient's bytes.

    At least 1, at most min(m, n), where C is the mean message itself.
    """
    column = column_bytes(m, n, types, world_size)
    given = numel * types.gradient.itemsize
    k = math.floor(ratio * given * (1 + 1e-12) / max(column, 1)) if rank is None else rank
    return max(1, min(k, m, n))


def plan_view(
    layout: Tensor,
    types: Types,
    world_size: int,
    compressor: str,
    ratio: float,
    sketch_dim: int,
    row_width: int | None,
    rank: int | None = None,
) -> View:
    """The plan's rule: see the tensor as a matrix; compress it only where that saves bytes.

    Ratio 1 leaves it dense, whatever that would save.
    Compressed bytes are r m sketch numbers and K n row elements for ARC-Top-K, K n row elements for
    Rand-K, K values and K int32 indices for Top-K, which looks at single elements whatever the
    rows, k (m + n) numbers of two factors for low rank; on a uint8 wire a unit a row besides, or
    norms a column; and one flag each, of bytes two. Low rank on bytes has nothing dense: what is no
    matrix is one of one row. Top-K gathers: in a ring, a rank sends N - 1 times its bytes,
    against 2 (N - 1) / N times for an all-reduce, hence max(N, 2) / 2 times its bytes are compared.
    """
    numel, wire, sketch = layout.numel(), types.wire.itemsize, types.sketch.itemsize
    dense_bytes = numel * types.dense.itemsize
    stays_dense = View(1, numel, 1, numel, False, dense_bytes)
    if types.sketch == torch.uint8 and numel > 0:
        row_bytes = column_bytes(1, numel, types, world_size) + 2
        stays_dense = View(1, numel, 1, numel, True, row_bytes)
    shape = matrix_shape(layout, row_width)
    if shape is None or compressor == "dense" or (ratio == 1 and rank is None):
        return stays_dense
    m, n = (numel, 1) if compressor == "top_k" else shape
    low_rank = compressor == "low_rank"
    k = rank_of(m, n, numel, types, world_size, ratio, rank) if low_rank else kept(ratio, m)
    unit = 1 if types.wire == torch.uint8 else 0
    flag = sketch * (2 if types.sketch == torch.uint8 else 1)
    wire_bytes = {
        "arc_topk": ((sketch_dim + unit) * m + 1) * sketch + k * n * wire,
        "rand_k": (k * n + 1) * wire,
        "top_k": k * (wire + 4) + 4,
        "low_rank": k * column_bytes(m, n, types, world_size) + flag,
    }[compressor]
    traffic = wire_bytes * (max(world_size, 2) / 2 if compressor == "top_k" else 1)
    return View(m, n, k, numel, True, wire_bytes) if traffic < dense_bytes else stays_dense
