"""The algorithm in plain torch, written straight from the equations: the oracle of the tests.

N ranks live in one process; nothing is fast, nothing is hidden, and nothing of the native engine is
used. Whoever wants to know what the engine computes reads this file from top to bottom:

1. random numbers     Philox4x32-10, the projection V, the keys of Rand-K
2. selection          sketch -> scores -> top_rows, and what "a valid top K within rounding" means
3. the wire           what narrowing a value to the wire's type does to it
4. compressors        messages X_1 .. X_N in, own parts C_1 .. C_N and their mean C out
5. error feedback     gradient g_i in, message X_i out, and the state that remembers the difference
6. plan               which tensor is seen as which matrix, and which one stays dense
7. Oracle             all of it together, step by step

Notation:

========= ========================================================================================
N, i      number of ranks; one rank
g_i       gradient of rank i
m x n     matrix view of one tensor: m rows of n columns
r, V      sketch dimension; the n x r projection, i.i.d. N(0, 1), the same on all ranks
K, S      number of rows kept; the K selected row indices, ascending
X_i       message of rank i, what it would like everybody to add up
C_i, C    what rank i really contributed; C = 1/N sum C_i, what everybody applies
e_i       residual of EF14
h_i, h    own and shared gradient estimate of EF21 and EF21M
v_i, t_i  momentum of EF21M; the tracker t_i = v_i - h_i, which is what is kept of it
========= ========================================================================================

Sources: "An All-Reduce Compatible Top-K Compressor for Communication-Efficient Distributed
Learning" (arXiv 2510.26709v3) for ARC-Top-K; Fatkhullin, Tyurin, Richtarik, "Momentum Provably
Improves Error Feedback!" (NeurIPS 2023) for EF21 with momentum (EF21-SGDM, here EF21M); Salmon et
al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011) for Philox.

Arithmetic: what the equations fix element by element (error feedback, rounding to the wire's type)
is done in the types the engine uses, in the same order, without fused multiply-adds. What depends
on an order of summation (sketches, reductions) is done in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# 1. Random numbers: counter-based, so that every rank makes the same ones without talking.
# --------------------------------------------------------------------------------------------------

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)  # multipliers
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)  # key increments: golden ratio, sqrt(3) - 1
_LOW32 = 0xFFFFFFFF

PROJECTION_STREAM = 0x41524356  # "ARCV"
RAND_K_STREAM = 0x52414E4B  # "RANK"


def philox(counter: Sequence[Tensor | int], key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: ten rounds of multiply and mix over a 128-bit counter.

    Args:
        counter: four 32-bit words; integers, or int64 tensors of shapes that broadcast.
        key: two 32-bit words.

    Returns:
        int64 tensor [..., 4] of 32-bit words.
    """
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap around; the mask after the shift makes the upper half right again.
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        high0, low0 = (p0 >> 32) & _LOW32, p0 & _LOW32
        high1, low1 = (p1 >> 32) & _LOW32, p1 & _LOW32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_W[0]) & _LOW32, (k1 + _PHILOX_W[1]) & _LOW32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _key(seed: int, stream: int) -> tuple[int, int]:
    return seed & _LOW32, ((seed >> 32) & _LOW32) ^ stream


def normals(words: Tensor) -> Tensor:
    """Box-Muller: 4 words of 32 bits to 4 independent N(0, 1) numbers, in float64.

    A pair (x0, x1) gives u1 = ((x0 >> 8) + 1) 2^-24 in (0, 1] and u2 = (x1 >> 8) 2^-24 in [0, 1),
    then sqrt(-2 ln u1) times cos and sin of 2 pi u2. The engine does the same in float32, so its
    numbers agree to about 1e-6.

    Args:
        words: int64 [..., 4], each in [0, 2^32).

    Returns:
        float64 [..., 4].
    """
    u1 = ((words[..., 0::2] >> 8) + 1).double() * 2.0**-24
    u2 = (words[..., 1::2] >> 8).double() * 2.0**-24
    radius, angle = torch.sqrt(-2 * torch.log(u1)), 2 * math.pi * u2
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(-2)


def projection(seed: int, step: int, n: int, r: int) -> Tensor:
    """The projection V of one step, the same for all matrices and ranks.

    Element (k, c) is number c % 4 of the block with counter (k, c / 4, step_lo, step_hi). Row k
    does not depend on n: a matrix of n columns uses the first n rows of a V made for the widest.

    Args:
        seed: 64 bits; with a constant of V's own it is the key.
        step: 64 bits, the exchange count.
        n: columns of the matrix.
        r: sketch dimension.

    Returns:
        float64 [n, r], i.i.d. N(0, 1).
    """
    rows = torch.arange(n).unsqueeze(1)
    groups = torch.arange((r + 3) // 4).unsqueeze(0)
    counter = (rows, groups, step & _LOW32, (step >> 32) & _LOW32)
    return normals(philox(counter, _key(seed, PROJECTION_STREAM))).flatten(1)[:, :r]


def rand_k_keys(seed: int, step: int, stream: int, m: int) -> Tensor:
    """The uniform 32-bit key of each of m rows; Rand-K keeps the K rows of largest key.

    Row j has word j % 4 of the block with counter (j / 4, stream, step_lo, step_hi).

    Args:
        seed: 64 bits; with a constant of Rand-K's own it is the key.
        step: 64 bits, the exchange count.
        stream: tells the tensors of one step apart; must be the same on all ranks.
        m: rows.

    Returns:
        int64 [m], each in [0, 2^32).
    """
    blocks = torch.arange((m + 3) // 4)
    counter = (blocks, stream, step & _LOW32, (step >> 32) & _LOW32)
    return philox(counter, _key(seed, RAND_K_STREAM)).flatten()[:m]


# --------------------------------------------------------------------------------------------------
# 2. Selection
# --------------------------------------------------------------------------------------------------


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
    """The indices of the K largest values, ascending; ties go to the smaller index, NaN is last.

    Args:
        values: [m], any real or integer type.
        k: K.

    Returns:
        int64 [min(k, m)], ascending.
    """
    ordered = values.nan_to_num(nan=-math.inf) if values.is_floating_point() else values
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


# --------------------------------------------------------------------------------------------------
# 3. The wire
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wire:
    """What happens to a value on its way: rounded to the wire's type, summed, divided by N.

    The sum of N values may overflow though none of them does, so they are scaled by
    2^-ceil(log2 N) before they are summed. In float16 they are clamped to its largest finite number
    65504 before. (A clamp after the scaling would not do: N times 65504 overflows.) Infinities and
    NaN pass.

    Attributes:
        dtype: type that travels.
        world_size: N.
        work: float32, or float64 for float64 gradients: the type of what comes back.
        summed: False where values are gathered rather than summed, hence need no scale.
    """

    dtype: torch.dtype
    world_size: int
    work: torch.dtype
    summed: bool = True

    @property
    def scale(self) -> float:
        """The power of two that the values are divided by before they are summed."""
        return 2.0 ** math.ceil(math.log2(self.world_size)) if self.summed else 1.0

    def send(self, x: Tensor) -> Tensor:
        """The values as they travel, in `dtype`."""
        if self.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            x = torch.where(x.isinf(), x, x.clamp(-largest, largest))
        return (x / self.scale).to(self.dtype)

    def value(self, sent: Tensor) -> Tensor:
        """What was sent, in the work type and at its own scale: the part that counts as sent."""
        return sent.to(self.work) * self.scale

    def mean(self, sent: Sequence[Tensor]) -> Tensor:
        """The mean over ranks of what was sent. A sum on the wire is rounded to the wire's type."""
        total = torch.stack(list(sent)).double().sum(dim=0)
        total = total.to(self.dtype if self.summed else self.work).to(self.work)
        return total / (self.world_size / self.scale)


# --------------------------------------------------------------------------------------------------
# 4. Compressors: X_1 .. X_N in, C_1 .. C_N and C out
# --------------------------------------------------------------------------------------------------


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


def send_rows(x: Sequence[Tensor], rows: Tensor, wire: Wire) -> tuple[list[Tensor], Tensor]:
    """Steps (4) to (6) of ARC-Top-K and Rand-K: pack rows S, reduce them, put them in place.

    No index travels, since all ranks send the same rows.

    Args:
        x: messages [m, n], one a rank.
        rows: S, int64 [K].
        wire: what they travel by.

    Returns:
        C_i of every rank and C: zero outside S.
    """
    sent = [wire.send(xi[rows]) for xi in x]
    empty = torch.zeros(x[0].shape, dtype=wire.work)
    own = [empty.index_copy(0, rows, wire.value(s)) for s in sent]
    return own, empty.index_copy(0, rows, wire.mean(sent))


def arc_topk(
    x: Sequence[Tensor],
    v: Tensor,
    k: int,
    wire: Wire,
    selected: Tensor | None = None,
    rtol: float = 1e-5,
) -> Compressed:
    """ARC-Top-K: the rows that are largest in the mean, found by an all-reduced sketch.

    Args:
        x: messages [m, n], one a rank.
        v: projection [n, r], float64.
        k: K.
        wire: what the rows travel by; the sketches travel in the work type.
        selected: go on with these rows, after checking that they are a top K within rounding.
        rtol: that rounding, relative to the sum of the moduli of what makes up a row's sketch.

    Raises:
        ValueError: `selected` is not a valid top K.
    """
    p = torch.stack([sketch(xi, v) for xi in x]).mean(dim=0)  # (1) sketch, (2) all-reduce
    row_scores = scores(p)  # (3) score, select
    rows = top_rows(row_scores, k)
    if selected is not None:
        magnitude = torch.stack([sketch(xi.abs(), v.abs()) for xi in x]).mean(dim=0).norm(dim=1)
        _check(row_scores, selected, k, rtol, magnitude)
        rows = selected.long()
    own, mean = send_rows(x, rows, wire)
    energies = float(row_scores.sum()), float(mean.double().square().sum())
    return Compressed(own, mean, rows, row_scores, *energies)


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


# --------------------------------------------------------------------------------------------------
# 5. Error feedback: one object is one rank's state of one tensor
# --------------------------------------------------------------------------------------------------


@dataclass
class Feedback:
    """No feedback, and the frame of the others: X_i = g_i, DDP gets C.

    A step calls `prepare(g)`, then `sent(C_i)` and `received(C)`, then `output(C)`; or, where it
    does not count for this tensor, `prepare(g)` and `undo(g)`. All tensors are flat, [d]; arguments
    and results have the work type, the state its own, to which each new value is rounded once.

    Attributes:
        numel: d.
        work: float32 or float64.
        state: type of what is kept.
        eta: momentum of EF21M.
    """

    numel: int
    work: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    eta: float = 0.1
    _stored: Tensor = field(init=False, repr=False)

    dense_start: ClassVar[bool] = False  # whether the first compressed step is dense
    own_state: ClassVar[tuple[str, ...]] = ()  # names of what is kept of rank i
    shared_state: ClassVar[tuple[str, ...]] = ()  # names of what all ranks keep alike

    def __post_init__(self) -> None:
        for name in self.own_state + self.shared_state:
            setattr(self, name, torch.zeros(self.numel, dtype=self.state))

    def _load(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name)
        return value.to(self.work)

    def _store(self, name: str, value: Tensor) -> None:
        setattr(self, name, value.to(self.state))

    def _store_finite(self, name: str, value: Tensor) -> Tensor:
        """Stores where finite, leaves the old value elsewhere: the state stays finite for ever."""
        rounded = value.to(self.state)
        self._stored = rounded.isfinite()
        setattr(self, name, torch.where(self._stored, rounded, getattr(self, name)))
        return rounded.to(self.work)

    def _restore(self, name: str, value: Tensor) -> None:
        """Stores where the last `_store_finite` did."""
        setattr(self, name, torch.where(self._stored, value.to(self.state), getattr(self, name)))

    def start(self, g: Tensor, mean: Tensor) -> None:
        """The dense first step: v_i = h_i = g_i, h = mean g."""

    def prepare(self, g: Tensor) -> Tensor:
        """The message X_i."""
        return g

    def sent(self, c: Tensor) -> None:
        """C_i was contributed."""

    def received(self, c: Tensor) -> None:
        """C is the mean contribution."""

    def undo(self, g: Tensor) -> None:
        """Takes back `prepare(g)`, by solving its equation for the old state."""

    def output(self, c: Tensor) -> Tensor:
        """What DDP gets."""
        return c


class NoFeedback(Feedback):
    """X_i = g_i; what is not sent is lost."""


class EF14(Feedback):
    """X_i = g_i + e_i; e_i = X_i - C_i; DDP gets C.

    Between `prepare` and `sent`, e holds the message itself: e = fl(g + e). Invariant, exactly and
    element by element: C_i + e_i = X_i.
    """

    own_state = ("e",)

    def prepare(self, g: Tensor) -> Tensor:
        """e_i = g_i + e_i, the message."""
        return self._store_finite("e", self._load("e") + g)

    def sent(self, c: Tensor) -> None:
        """e_i = X_i - C_i."""
        self._store("e", self._load("e") - c)

    def undo(self, g: Tensor) -> None:
        """e_i = X_i - g_i."""
        self._restore("e", self._load("e") - g)


class EF21(Feedback):
    """X_i = g_i - h_i; h_i += C_i, h += C; DDP gets h.

    Invariant: h = 1/N sum h_i up to the rounding of the reductions.
    """

    dense_start = True
    own_state: ClassVar[tuple[str, ...]] = ("h_i",)
    shared_state = ("h",)

    def start(self, g: Tensor, mean: Tensor) -> None:
        """h_i = g_i, h = mean g."""
        self._store("h_i", g)
        self._store("h", mean)

    def prepare(self, g: Tensor) -> Tensor:
        """X_i = g_i - h_i; not stored, as it can be formed again."""
        return g - self._load("h_i")

    def sent(self, c: Tensor) -> None:
        """h_i += C_i."""
        self._store("h_i", self._load("h_i") + c)

    def received(self, c: Tensor) -> None:
        """Adds: h += C."""
        self._store("h", self._load("h") + c)

    def output(self, c: Tensor) -> Tensor:
        """DDP gets h."""
        return self._load("h")


class EF21M(EF21):
    """v_i = (1 - eta) v_i + eta g_i; X_i = v_i - h_i; h_i += C_i, h += C; DDP gets h.

    Only differences to h_i matter, so the tracker t_i = v_i - h_i is kept in place of v_i: the same
    thing with less rounding. Subtract h_i from both sides of the first equation:
    t_i = (1 - eta) t_i + eta (g_i - h_i), which is the message; then t_i -= C_i, as h_i += C_i.

    eta = 1 is EF21: the tracker's past has no weight.
    """

    own_state = ("t", "h_i")

    @property
    def v(self) -> Tensor:
        """The momentum v_i = t_i + h_i, in the work type."""
        return self._load("t") + self._load("h_i")

    def start(self, g: Tensor, mean: Tensor) -> None:
        """v_i = h_i = g_i, so t_i = 0; h = mean g."""
        super().start(g, mean)
        self._store("t", torch.zeros_like(g))

    def prepare(self, g: Tensor) -> Tensor:
        """t_i = (1 - eta) t_i + eta (g_i - h_i), the message."""
        tracker = self._load("t") * (1 - self.eta)
        return self._store_finite("t", tracker + (g - self._load("h_i")) * self.eta)

    def sent(self, c: Tensor) -> None:
        """t_i -= C_i, h_i += C_i."""
        self._store("t", self._load("t") - c)
        super().sent(c)

    def undo(self, g: Tensor) -> None:
        """t_i = (t_i - eta (g_i - h_i)) / (1 - eta), to a few units in the last place of X/(1-eta).

        eta = 1 leaves nothing of the old tracker in the new one, nor will anybody ask for it.
        """
        if self.eta < 1:
            tracker = self._load("t") - (g - self._load("h_i")) * self.eta
            self._restore("t", tracker / (1 - self.eta))


FEEDBACKS: dict[str, type[Feedback]] = {
    "none": NoFeedback,
    "ef14": EF14,
    "ef21": EF21,
    "ef21m": EF21M,
}


# --------------------------------------------------------------------------------------------------
# 6. Plan
# --------------------------------------------------------------------------------------------------


def memory_order(layout: Tensor) -> list[int]:
    """Dimensions from the largest stride to the smallest; equal strides keep their order."""
    strides = layout.stride()
    return sorted(range(layout.dim()), key=lambda d: -strides[d])


def flatten(tensor: Tensor, layout: Tensor) -> Tensor:
    """The elements in the order in which a dense tensor like `layout` has them in memory: [d]."""
    return tensor.permute(memory_order(layout)).flatten()


def unflatten(flat: Tensor, layout: Tensor) -> Tensor:
    """The inverse of `flatten`: a tensor of the shape and strides of `layout`."""
    order = memory_order(layout)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.reshape([layout.shape[d] for d in order]).permute(inverse)


@dataclass(frozen=True)
class View:
    """One tensor as the algorithm sees it.

    Attributes:
        m, n: rows and columns; the last row may be short of n elements.
        k: K, rows kept.
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
        state: of the error feedback; the work type unless told otherwise, always for float64.
        dense: of a dense tensor on the wire. It has no state to keep what rounding takes away, so
            it is not narrowed: the gradient's type, or float32 for a 16-bit gradient whose wire has
            another type. Rand-K has one payload, hence one type: the wire's.
    """

    gradient: torch.dtype
    work: torch.dtype
    wire: torch.dtype
    state: torch.dtype
    dense: torch.dtype

    @classmethod
    def of(
        cls,
        gradient: torch.dtype,
        wire: torch.dtype | None = None,
        state: torch.dtype | None = None,
        compressor: str = "arc_topk",
    ) -> Types:
        """From the gradient's type, the two that may be chosen, and the compressor."""
        work = torch.float64 if gradient == torch.float64 else torch.float32
        wire = gradient if wire is None else wire
        state = work if state is None or work == torch.float64 else state
        dense = gradient if gradient == work or wire == gradient else torch.float32
        dense = wire if compressor == "rand_k" else dense
        return cls(gradient, work, wire, state, dense)


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


def plan_view(
    layout: Tensor,
    types: Types,
    world_size: int,
    compressor: str,
    ratio: float,
    sketch_dim: int,
    row_width: int | None,
) -> View:
    """The plan's rule: see the tensor as a matrix; compress it only where that saves bytes.

    Compressed bytes are r m sketch numbers and K n row elements for ARC-Top-K, K n row elements for
    Rand-K, K values and K int32 indices for Top-K, which looks at single elements whatever the
    rows; and one flag each. Top-K gathers: in a ring, a rank sends N - 1 times its bytes, against
    2 (N - 1) / N times for an all-reduce, hence max(N, 2) / 2 times its bytes are compared.
    """
    numel, wire, work = layout.numel(), types.wire.itemsize, types.work.itemsize
    dense_bytes = numel * types.dense.itemsize
    stays_dense = View(1, numel, 1, numel, False, dense_bytes)
    shape = matrix_shape(layout, row_width)
    if shape is None or compressor == "dense":
        return stays_dense
    m, n = (numel, 1) if compressor == "top_k" else shape
    k = kept(ratio, m)
    wire_bytes = {
        "arc_topk": (sketch_dim * m + 1) * work + k * n * wire,
        "rand_k": (k * n + 1) * wire,
        "top_k": k * (wire + 4) + 4,
    }[compressor]
    traffic = wire_bytes * (max(world_size, 2) / 2 if compressor == "top_k" else 1)
    return View(m, n, k, numel, True, wire_bytes) if traffic < dense_bytes else stays_dense


# --------------------------------------------------------------------------------------------------
# 7. The oracle
# --------------------------------------------------------------------------------------------------


# Rows (ARC-Top-K, Rand-K), element indices of each rank (Top-K), or the oracle's own choice.
Selection: TypeAlias = Any


@dataclass
class Result:
    """One tensor's result of one step.

    Attributes:
        output: what DDP gets on every rank: shape, strides and dtype of the gradient.
        kind: "dense", "compressed", "unused" (zero on every rank), "non-finite" (compressed tensors
            only; the result is NaN everywhere).
        compressed: the compressor's result where kind is "compressed".
    """

    output: Tensor
    kind: str
    compressed: Compressed | None = None


class Oracle:
    """The tensors of one bucket on all N ranks, over the steps.

    Args:
        layouts: of each tensor a shape, or a tensor whose shape and strides count.
        dtype: of the gradients.
        world_size: N.
        compressor: "dense", "arc_topk", "rand_k", "top_k".
        feedback: "none", "ef14", "ef21", "ef21m".
        ratio, sketch_dim, row_width, eta, start_step, wire_dtype, state_dtype, seed: as in the
            package's configuration; eta None means 0.1.
        may_be_unused: a gradient that is zero on every rank stands for none, as DDP makes it for
            parameters that nobody used: no state changes, and the result is zero.
        streams: of each tensor the number that tells its Rand-K keys apart; None: 0, 1, 2, ...

    Attributes:
        steps: exchanges so far; the coming step's V is the one of this number.
        started: False until the dense first step of EF21 and EF21M was made.
        views: how each tensor is seen.
        states: `states[i][t]` is the `Feedback` of tensor t on rank i, flat and in memory order. A
            dense tensor needs state only under EF21M, and only `h`.
    """

    def __init__(
        self,
        layouts: Sequence[Tensor | Sequence[int]],
        dtype: torch.dtype,
        world_size: int,
        *,
        compressor: str = "arc_topk",
        feedback: str = "ef14",
        ratio: float = 0.1,
        sketch_dim: int = 4,
        row_width: int | None = None,
        eta: float | None = None,
        start_step: int = 0,
        wire_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        may_be_unused: bool = False,
        streams: Sequence[int] | None = None,
    ) -> None:
        if eta is not None and feedback != "ef21m":
            raise ValueError(f"eta: expected None with feedback={feedback!r}, got {eta}")
        self.layouts = [
            t if isinstance(t, Tensor) else torch.empty(tuple(t), device="meta") for t in layouts
        ]
        self.world_size = world_size
        self.types = Types.of(dtype, wire_dtype, state_dtype, compressor)
        self.compressor, self.feedback = compressor, feedback
        self.sketch_dim, self.start_step, self.seed = sketch_dim, start_step, seed
        self.eta = 0.1 if eta is None else eta
        self.may_be_unused = may_be_unused
        self.streams = list(range(len(self.layouts))) if streams is None else list(streams)
        self.views = [
            plan_view(t, self.types, world_size, compressor, ratio, sketch_dim, row_width)
            for t in self.layouts
        ]
        kind = FEEDBACKS[feedback]
        self.states = [
            [kind(v.numel, self.types.work, self.types.state, self.eta) for v in self.views]
            for _ in range(world_size)
        ]
        self.steps = 0
        self.started = not kind.dense_start

    # -- what the tests look at --------------------------------------------------------------------

    def state(self, name: str, rank: int, tensor: int) -> Tensor:
        """State "e", "t", "v", "h_i" or "h", in the shape and strides of the tensor."""
        return unflatten(getattr(self.states[rank][tensor], name), self.layouts[tensor])

    @property
    def dense_bytes(self) -> int:
        """Bytes a rank hands to the collective in a step of plain averaging."""
        return sum(v.numel for v in self.views) * self.types.gradient.itemsize

    @property
    def wire_bytes(self) -> int:
        """Bytes a rank hands to the collectives in a compressed step, flags included."""
        return sum(v.wire_bytes for v in self.views)

    # -- one step ----------------------------------------------------------------------------------

    def step(
        self,
        gradients: Sequence[Sequence[Tensor]],
        selected: Sequence[Selection] | None = None,
        rtol: float = 1e-5,
    ) -> list[Result]:
        """One exchange of all tensors.

        Args:
            gradients: `gradients[i][t]`, the gradient of tensor t on rank i.
            selected: what another implementation selected, per tensor: rows (ARC-Top-K, Rand-K),
                element indices of each rank (Top-K), or None. It is checked, then used.
            rtol: rounding within which `selected` may differ.

        Returns:
            A `Result` a tensor.

        Raises:
            ValueError: `selected` is not a valid top K within rounding.
        """
        by_tensor = [
            [flatten(own[t], layout).to(self.types.work) for own in gradients]
            for t, layout in enumerate(self.layouts)
        ]
        step, self.steps = self.steps, self.steps + 1
        if step < self.start_step:
            return [self._result(t, self._plain_mean(g), "dense") for t, g in enumerate(by_tensor)]
        if not self.started:
            return self._dense_start(by_tensor)
        all_dense = not any(v.compressed for v in self.views)
        in_place = all_dense and self.types.dense == self.types.gradient
        wire = Wire(self.types.dense, self.world_size, self.types.work, self._sums)
        results = []
        for t, g in enumerate(by_tensor):
            if self.views[t].compressed:
                choice = None if selected is None else selected[t]
                results.append(self._compressed_step(t, g, step, choice, rtol))
            else:
                mean = self._plain_mean(g) if in_place else dense(g, wire).mean
                results.append(self._dense_step(t, mean))
        return results

    @property
    def _sums(self) -> bool:
        """Whether values are summed on their way; Top-K's are gathered."""
        return self.compressor != "top_k"

    def _plain_mean(self, g: list[Tensor]) -> Tensor:
        """What DDP itself would do: divide by N, then sum, in the gradient's type."""
        parts = [(gi / self.world_size).to(self.types.gradient) for gi in g]
        return torch.stack(parts).double().sum(dim=0).to(self.types.gradient).to(self.types.work)

    def _result(
        self, t: int, output: Tensor, kind: str, compressed: Compressed | None = None
    ) -> Result:
        flat = output.to(self.types.gradient)
        return Result(unflatten(flat, self.layouts[t]), kind, compressed)

    def _dense_start(self, by_tensor: list[list[Tensor]]) -> list[Result]:
        """v_i = h_i = g_i, h = mean g; put off to the next step where a mean is not finite."""
        means = [self._plain_mean(g) for g in by_tensor]
        self.started = all(bool(mean.isfinite().all()) for mean in means)
        outputs = means
        if self.started:
            for i, own in enumerate(self.states):
                for state, g, mean in zip(own, by_tensor, means, strict=True):
                    state.start(g[i], mean)
            outputs = [s.output(mean) for s, mean in zip(self.states[0], means, strict=True)]
        return [self._result(t, output, "dense") for t, output in enumerate(outputs)]

    def _dense_step(self, t: int, mean: Tensor) -> Result:
        """Mean g; under EF21M h = (1 - eta) h + eta mean g, its equations with C_i = X_i.

        The mean itself tells what a flag tells of a compressed tensor.
        """
        if self.feedback != "ef21m":
            return self._result(t, mean, "dense")
        shared = self.states[0][t]
        if self.may_be_unused and not mean.any():
            return self._result(t, torch.zeros_like(mean), "unused")
        h = shared._load("h") * (1 - self.eta) + mean * self.eta
        if not h.isfinite().all():
            return self._result(t, h, "non-finite")
        for own in self.states:
            own[t]._store("h", h)
        return self._result(t, shared.output(mean), "dense")

    def _compressed_step(
        self,
        t: int,
        g: list[Tensor],
        step: int,
        selected: Selection,
        rtol: float,
    ) -> Result:
        states, view = [own[t] for own in self.states], self.views[t]
        x = [state.prepare(gi) for state, gi in zip(states, g, strict=True)]
        used = not self.may_be_unused or any(bool(gi.any()) for gi in g)
        finite = all(bool(xi.isfinite().all()) for xi in x)
        if not used or not finite:
            for state, gi in zip(states, g, strict=True):
                state.undo(gi)
            zero = torch.zeros_like(g[0])
            output = zero if finite else torch.full_like(zero, math.nan)
            return self._result(t, output, "unused" if finite else "non-finite")

        result = self._compress(t, [view.matrix(xi) for xi in x], step, selected, rtol)
        mean = view.flat(result.mean)
        for state, own in zip(states, result.own, strict=True):
            state.sent(view.flat(own))
            state.received(mean)
        return self._result(t, states[0].output(mean), "compressed", result)

    def _compress(
        self, t: int, x: list[Tensor], step: int, selected: Selection, rtol: float
    ) -> Compressed:
        view = self.views[t]
        wire = Wire(self.types.wire, self.world_size, self.types.work, self._sums)
        if self.compressor == "arc_topk":
            v = projection(self.seed, step, view.n, self.sketch_dim)
            return arc_topk(x, v, view.k, wire, selected, rtol)
        if self.compressor == "rand_k":
            keys = rand_k_keys(self.seed, step, self.streams[t], view.m)
            return rand_k(x, keys, view.k, wire, selected)
        return top_k(x, view.k, wire, selected, rtol)
