"""The algorithm in plain torch, written straight from the equations: the oracle of the tests.

N ranks live in one process; nothing is fast, nothing is hidden, and nothing of the native engine is
used. Whoever wants to know what the engine computes reads these files in this order; none imports a
later one:

1. random_numbers.py   Philox4x32-10, the projection V, the keys of Rand-K, columns of low rank's W
2. selection.py        sketch -> scores -> top_rows, and what "a valid top K within rounding" means
3. levels.py           the uint8 wire: integers, in units that all ranks share
4. directions.py       low rank on it: the first factor as directions and norms
5. wire.py             what narrowing a value to any other wire's type does to it
6. compressors.py      messages X_1 .. X_N in, own parts C_1 .. C_N and their mean C out
7. low_rank.py         the compressor of two thin factors
8. feedback.py         gradient g_i in, message X_i out, and the state that remembers the difference
9. layout.py           in which order the elements of a tensor lie in memory
10. plan.py            which tensor is seen as which matrix, and which one stays dense
11. spike_limit.py     what is cut off a gradient that is much longer than usual
12. oracle.py          all of it together, step by step

Notation:

========= ========================================================================================
N, i      number of ranks; one rank
g_i       gradient of rank i
m x n     matrix view of one tensor: m rows of n columns
r, V      sketch dimension; the n x r projection, i.i.d. N(0, 1), the same on all ranks
K, S      number of rows kept; the K selected row indices, ascending
k, W      columns of low rank's factors; the n x k basis of the step before, of unit columns
P^, R_i   orth(mean X_i W), m x k; X_i^T P^ as sent, n x k
X_i       message of rank i, what it would like everybody to add up
C_i, C    what rank i really contributed; C = 1/N sum C_i, what everybody applies
e_i       residual of EF14
h_i, h    own and shared gradient estimate of EF21 and EF21M
v_i, t_i  momentum of EF21M; the tracker t_i = v_i - h_i, which is what is kept of it
========= ========================================================================================

Sources: "An All-Reduce Compatible Top-K Compressor for Communication-Efficient Distributed
Learning" (arXiv 2510.26709v3) for ARC-Top-K; Fatkhullin, Tyurin, Richtarik, "Momentum Provably
Improves Error Feedback!" (NeurIPS 2023) for EF21 with momentum (EF21-SGDM, here EF21M); Vogels,
Karimireddy, Jaggi, "PowerSGD" (NeurIPS 2019) for low rank; Salmon et al., "Parallel Random Numbers:
As Easy as 1, 2, 3" (SC 2011) for Philox.

Arithmetic: what the equations fix element by element (error feedback, rounding to the wire's type)
is done in the types the engine uses, in the same order, without fused multiply-adds. What depends
on an order of summation (sketches, reductions) is done in float64 and rounded once.
"""

from arc_topk.reference.compressors import arc_topk, rand_k, top_k
from arc_topk.reference.directions import Directions, first_two_bytes
from arc_topk.reference.feedback import EF14, EF21, EF21M
from arc_topk.reference.layout import flatten, unflatten
from arc_topk.reference.levels import Levels, best_step, most_level, reach, unit_of
from arc_topk.reference.low_rank import drawn, low_rank, orthonormalise, unit_columns
from arc_topk.reference.oracle import Oracle
from arc_topk.reference.plan import Types, matrix_shape
from arc_topk.reference.random_numbers import normals, philox, projection, rand_k_keys
from arc_topk.reference.selection import scores, sketch, top_rows, valid_top_k
from arc_topk.reference.wire import Wire

__all__ = [
    "EF14",
    "EF21",
    "EF21M",
    "Directions",
    "Levels",
    "Oracle",
    "Types",
    "Wire",
    "arc_topk",
    "best_step",
    "drawn",
    "first_two_bytes",
    "flatten",
    "low_rank",
    "matrix_shape",
    "most_level",
    "normals",
    "orthonormalise",
    "philox",
    "projection",
    "rand_k",
    "rand_k_keys",
    "reach",
    "scores",
    "sketch",
    "top_k",
    "top_rows",
    "unflatten",
    "unit_columns",
    "unit_of",
    "valid_top_k",
]
