"""Layouts nobody would think of, for the CUDA kernels: their bodies on the host, or on a GPU.

Every thread's elements are counted, and whole steps must be the CPU's, bit by bit. The work is done
in C++ (tests/cpp/layouts.cpp).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401 (brings the libraries that ours asks for)
from hypothesis import example, given, settings
from hypothesis import strategies as st

LIBRARY = Path(__file__).parents[2] / "build/bin/libarc_topk_layouts.so"
MAX_NUMEL = 50_000  # of a tensor: milliseconds

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(
        not LIBRARY.exists(),
        reason=f"no {LIBRARY.name}: `make build` builds it, with ARC_TOPK_TESTS",
    ),
]

# As in C++: csrc/feedback/feedback.h, csrc/kernels/kernels.h, tests/cpp/layouts.cpp.
FEEDBACKS = {"none": 0, "ef14": 1, "ef21": 2, "ef21m": 3}
F32, F64, BF16, F16, U8 = range(5)
NOISE, ZEROS, ENDS_IN_NAN, BEGINS_WITH_INFINITY = range(4)
# Of gradient, state and wire; and what is sent is multiplied by.
TYPES = [
    (F32, F32, F32, 1.0),
    (F64, F64, F64, 1.0),
    (BF16, F32, BF16, 1.0),
    (F16, F32, F16, 0.25),
    (F32, BF16, BF16, 1.0),
    (BF16, BF16, F32, 1.0),
    (F32, F32, U8, 0.25),
    (F64, F64, U8, 0.25),
    (BF16, F32, U8, 0.25),
]


@dataclass
class Matrix:
    """One tensor as the plan sees it; kept == 0: it stays dense."""

    numel: int
    cols: int = 1
    kept: int = 0
    dense_in_first: bool = True
    contents: int = NOISE


@dataclass
class Layout:
    """A bucket."""

    matrices: list[Matrix]
    feedback: str = "ef21m"
    types: tuple[int, int, int, float] = TYPES[0]
    sketch_dim: int = 4


class CLayout(ctypes.Structure):
    """The same for C++."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("numel", ctypes.POINTER(ctypes.c_int64)),
        ("cols", ctypes.POINTER(ctypes.c_int64)),
        ("kept", ctypes.POINTER(ctypes.c_int64)),
        ("dense_in_first", ctypes.POINTER(ctypes.c_uint8)),
        ("contents", ctypes.POINTER(ctypes.c_uint8)),
        ("sketch_dim", ctypes.c_int64),
        ("wire_scale", ctypes.c_double),
        ("feedback", ctypes.c_uint8),
        ("gradient", ctypes.c_uint8),
        ("state", ctypes.c_uint8),
        ("wire", ctypes.c_uint8),
    )


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(LIBRARY))
    for function in (loaded.arc_topk_compare_steps, loaded.arc_topk_count_coverage):
        function.argtypes = [ctypes.POINTER(CLayout), ctypes.c_char_p, ctypes.c_int64]
        function.restype = ctypes.c_bool
    return loaded


def check(function: Callable[..., bool], layout: Layout) -> None:
    """Fails with what C++ has to say."""
    of = layout.matrices

    def array(kind: type[Any], name: str) -> Any:
        return (kind * len(of))(*(getattr(m, name) for m in of))

    gradient, state, wire, wire_scale = layout.types
    c = CLayout(
        len(of),
        array(ctypes.c_int64, "numel"),
        array(ctypes.c_int64, "cols"),
        array(ctypes.c_int64, "kept"),
        array(ctypes.c_uint8, "dense_in_first"),
        array(ctypes.c_uint8, "contents"),
        layout.sketch_dim,
        wire_scale,
        FEEDBACKS[layout.feedback],
        gradient,
        state,
        wire,
    )
    message = ctypes.create_string_buffer(1000)
    assert function(ctypes.byref(c), message, len(message)), message.value.decode()


# --- layouts --------------------------------------------------------------------------------------

# Beside small ones: the widths at which rows go from a group of lanes to a block, and to several.
WIDTHS = [1, 7, 8, 64, 1023, 1024, 1025, 8191, 8192, 8193, 12_000, 20_000]
contents = st.sampled_from([NOISE, NOISE, NOISE, ZEROS, ENDS_IN_NAN, BEGINS_WITH_INFINITY])


@st.composite
def compressed(draw: st.DrawFn) -> Matrix:
    cols = draw(st.one_of(st.sampled_from(WIDTHS), st.integers(1, 200)))
    most = max(1, min(MAX_NUMEL // cols, 300))
    rows = draw(st.one_of(st.sampled_from([n for n in (1, 7) if n <= most]), st.integers(1, most)))
    # Of the last row, if it is short. A plan's rows are never longer than the tensor.
    most_missing = cols - 1 if rows > 1 else 0
    missing = draw(st.one_of(st.integers(0, most_missing), st.sampled_from([0, most_missing])))
    kept = draw(st.one_of(st.integers(1, rows), st.just(rows)))
    return Matrix(rows * cols - missing, cols, kept, contents=draw(contents))


dense = st.builds(Matrix, st.integers(0, 70), dense_in_first=st.booleans(), contents=contents)
long_dense = st.builds(Matrix, st.sampled_from([8191, 8192, 8193, 20_001]), contents=contents)
small = st.integers(1, 9).map(lambda n: Matrix(16 * n - n % 3, 16, 1 + n // 3))
matrices = st.one_of(
    st.lists(compressed(), min_size=1, max_size=4),
    st.lists(st.one_of(compressed(), dense), min_size=1, max_size=6),
    st.lists(st.one_of(compressed(), dense, long_dense), min_size=1, max_size=3),
    st.lists(st.one_of(small, dense), min_size=30, max_size=120),
)
layouts = st.builds(
    Layout,
    matrices,
    st.sampled_from(list(FEEDBACKS)),
    st.sampled_from(TYPES),
    st.sampled_from([1, 2, 4, 5, 9]),
)
HARD = [
    Layout([Matrix(3 * 1100 - 1099, 1100, 2)]),  # a last row of one element, of a whole block's
    Layout([Matrix(2 * 20_000 - 19_000, 20_000, 2)]),  # which ends in its first of three pieces
    Layout([Matrix(2 * 1025 - 1, 1025, 2)]),  # a chunk of one element, the CPU's last, is missing
    Layout([Matrix(20_000, 20_000, 1), Matrix(5)]),  # one long row
    Layout([Matrix(0), Matrix(1, 1, 1), Matrix(0, dense_in_first=False), Matrix(7 * 7, 7, 3)]),
    Layout([Matrix(0)]),  # nothing at all
    Layout([Matrix(3), Matrix(64 * 64, 64, 7), Matrix(8193)] * 3, types=TYPES[2]),  # odd places
    Layout([Matrix(5 * 8193, 8193, 5), Matrix(40, 8, 2)], "ef14", TYPES[5], 9),
]


def and_hard_ones(test: Callable[[Layout], None]) -> Callable[[Layout], None]:
    for layout in HARD:
        test = example(layout)(test)
    return test


# The same in every run: a failure in CI is a failure here.
@settings(max_examples=200, deadline=None, derandomize=True)
@given(layouts)
@and_hard_ones
def test_any_layout_is_covered_once_and_its_steps_are_the_cpus(layout: Layout) -> None:
    # Coverage first: threads that leave the bucket could end the process in a step.
    check(library().arc_topk_count_coverage, layout)
    check(library().arc_topk_compare_steps, layout)
