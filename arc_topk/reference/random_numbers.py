"""Random numbers: counter-based, so that every rank makes the same ones without talking."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)  # multipliers
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)  # key increments: golden ratio, sqrt(3) - 1
_LOW32 = 0xFFFFFFFF

PROJECTION_STREAM = 0x41524356  # "ARCV"
RAND_K_STREAM = 0x52414E4B  # "RANK"
BASIS_STREAM = 0x41524357  # "ARCW"


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


def basis_column(seed: int, step: int, stream: int, column: int, n: int) -> Tensor:
    """One column of low rank's W where it is drawn: at first, and where it has become zero.

    Element j is number j % 4 of the block with counter (j / 4, column, step_lo, stream).

    Args:
        seed: 64 bits; with a constant of W's own it is the key.
        step: the exchange count.
        stream: tells the tensors of one step apart; must be the same on all ranks.
        column: of W.
        n: elements.

    Returns:
        float64 [n], i.i.d. N(0, 1).
    """
    blocks = torch.arange((n + 3) // 4)
    counter = (blocks, column, step & _LOW32, stream)
    return normals(philox(counter, _key(seed, BASIS_STREAM))).flatten()[:n]


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
