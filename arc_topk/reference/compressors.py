"""Compressors: messages X_1 .. X_N in, own parts C_1 .. C_N and their mean C out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arc_topk.reference.levels import Levels, total_of
from arc_topk.reference.selection import scores, sketch, top_rows, valid_top_k
from arc_topk.reference.wire import Wire


@dataclass
class Compressed:
    """What a compressor makes of the messages of all ranks.

    Attributes:
        own: C_i of every rank, [m, n] each, in the work type.
        mean: C, [m, n], in the work type.
        rows: the selected rows, int64 ascending: one tensor for all ranks, or for Top-K one a rank.
        scores: what they were selected by, [m], or for Top-K one a rank.
        score_energy: the sum of all scores, an unbiased estimate of ||mean X||^2; NaN unless
            the compressor is ARC-Top-K.
        mean_energy: ||C||^2. Divided by `score_energy` it is the energy captured. (The selected
            scores' own share would be biased upwards: the rows were chosen by the same noise.)
    """

    own: list[Tensor]
    mean: Tensor
    rows: Tensor | list[Tensor]
    scores: Tensor | list[Tensor]
    score_energy: float = math.nan
    mean_energy: float = math.nan


def _check(values: Tensor, rows: Tensor, k: int, rtol: float, magnitude: Tensor) -> None:
    if rows.numel() != k or not valid_top_k(values, rows, rtol, magnitude):
        raise ValueError(
            f"selected: expected a top {k} of {values.numel()} scores within rtol={rtol}, "
            f"got {rows.tolist()}; the oracle selects {top_rows(values, k).tolist()}"
        )


def send_rows(
    x: Sequence[Tensor], rows: Tensor, wire: Wire | Levels
) -> tuple[list[Tensor], Tensor]:
    """Steps (4) to (6) of ARC-Top-K and Rand-K: pack rows S, reduce them, put them in place.

    No index travels, since all ranks send the same rows.

    Args:
        x: messages [m, n], one a rank.
        rows: S, int64 [K].
        wire: what they travel by.

    Returns:
        C_i of every rank and C: zero outside S.
    """
    fitted = wire.fitted(x, rows)
    sent = [fitted.send(xi[rows], rank) for rank, xi in enumerate(x)]
    empty = torch.zeros(x[0].shape, dtype=wire.work)
    own = [empty.index_copy(0, rows, fitted.value(s)) for s in sent]
    return own, empty.index_copy(0, rows, fitted.mean(sent))


def arc_topk(
    x: Sequence[Tensor],
    v: Tensor,
    k: int,
    wire: Wire | Levels,
    selected: Tensor | None = None,
    rtol: float = 1e-5,
    sketch_dtype: torch.dtype | None = None,
) -> Compressed:
    """ARC-Top-K: the rows that are largest in the mean, found by an all-reduced sketch.

    Args:
        x: messages [m, n], one a rank.
        v: projection [n, r], float64.
        k: K.
        wire: what the rows travel by.
        selected: go on with these rows, after checking that they are a top K within rounding.
        rtol: that rounding, relative to the sum of the moduli of what makes up a row's sketch.
        sketch_dtype: the type that sketches travel in; None: the work type, taken for exact.

    Raises:
        ValueError: `selected` is not a valid top K.
    """
    own = [sketch(xi, v) for xi in x]  # (1) sketch
    p = mean_of_sketches(own, wire.work, sketch_dtype or wire.work)  # (2) all-reduce
    row_scores = scores(p)  # (3) score, select
    rows = top_rows(row_scores, k)
    if selected is not None:
        magnitude = torch.stack([sketch(xi.abs(), v.abs()) for xi in x]).mean(dim=0).norm(dim=1)
        _check(row_scores, selected, k, rtol, magnitude)
        rows = selected.long()
    parts, mean = send_rows(x, rows, wire)
    energies = float(row_scores.sum()), float(mean.double().square().sum())
    return Compressed(parts, mean, rows, row_scores, *energies)


def mean_of_sketches(p: Sequence[Tensor], work: torch.dtype, sketch: torch.dtype) -> Tensor:
    """The mean of what the first collective sums, in float64; in the work type taken for exact."""
    if sketch == work:
        return torch.stack(list(p)).mean(dim=0)
    return total_of(p, work, sketch).double() / len(p)


def rand_k(
    x: Sequence[Tensor], keys: Tensor, k: int, wire: Wire, selected: Tensor | None = None
) -> Compressed:
    """Rand-K: K rows drawn uniformly without replacement, by the largest of shared random keys.

    Args:
        x: messages [m, n], one a rank. Elements are rows of n = 1.
        keys: int64 [m].
        k: K.
        wire: what the rows travel by.
        selected: must be exactly the rows of largest key, as nothing here is rounded.

    Raises:
        ValueError: `selected` is another set of rows.
    """
    rows = top_rows(keys, k)
    if selected is not None and not torch.equal(rows, selected.long()):
        raise ValueError(f"selected: expected {rows.tolist()}, got {selected.tolist()}")
    return Compressed(*send_rows(x, rows, wire), rows, keys)


def top_k(
    x: Sequence[Tensor],
    k: int,
    wire: Wire,
    selected: Sequence[Tensor] | None = None,
    rtol: float = 1e-5,
) -> Compressed:
    """Top-K: each rank its own K elements of largest modulus; the sparse parts are averaged.

    The supports differ, so that values and indices have to be gathered: no all-reduce serves.

    Args:
        x: messages [d, 1], one a rank.
        k: K.
        wire: what the values travel by; gathered, not summed.
        selected: element indices, int64 [K] ascending, one tensor a rank.
        rtol: rounding of a modulus, relative to the largest modulus of the message.

    Raises:
        ValueError: `selected` is not a valid top K of some rank.
    """
    squares = [xi.double().square().flatten() for xi in x]
    rows = [top_rows(s, k) for s in squares]
    if selected is not None:
        for square, chosen in zip(squares, selected, strict=True):
            _check(square, chosen, k, rtol, square.max().sqrt().expand_as(square))
        rows = [chosen.long() for chosen in selected]
    own = []
    for xi, chosen in zip(x, rows, strict=True):
        values = wire.value(wire.send(xi[chosen]))
        own.append(torch.zeros(xi.shape, dtype=wire.work).index_copy(0, chosen, values))
    mean = torch.stack(own).double().mean(dim=0).to(wire.work)
    return Compressed(own, mean, rows, squares)


def dense(x: Sequence[Tensor], wire: Wire) -> Compressed:
    """Dense: everybody sends everything. C_i = X_i but for the wire's rounding."""
    sent = [wire.send(xi) for xi in x]
    rows = torch.arange(x[0].shape[0])
    return Compressed([wire.value(s) for s in sent], wire.mean(sent), rows, torch.ones(len(rows)))
