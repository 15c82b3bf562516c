// P^ = orth(P) and W from R: columns of unit norm, the same bits on every machine.
#pragma once

#include <algorithm>
#include <cmath>

#include "base/random.h"
#include "kernels/cpu/lanes.h"
#include "kernels/factors.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// Of at most kSumChunk elements.
inline double dot_of_chunk(const double* x, const double* y, int64_t n) {
  constexpr int kSums = 4;  // side by side, to hide how long an addition takes
  constexpr int64_t kWidth = Lanes<double>::kWidth;
  Lanes<double> sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth) {
#pragma GCC unroll 4
    for (int q = 0; q < kSums; ++q) {
      sum[q].add_product(load_lanes<double>(x + i + q * kWidth),
                         load_lanes<double>(y + i + q * kWidth));
    }
  }
  for (; i + kWidth <= n; i += kWidth)
    sum[0].add_product(load_lanes<double>(x + i), load_lanes<double>(y + i));
  sum[1].add_product(load_some_lanes<double>(x + i, n - i), load_some_lanes<double>(y + i, n - i));
  return (sum_lanes(sum[0]) + sum_lanes(sum[1])) + (sum_lanes(sum[2]) + sum_lanes(sum[3]));
}

inline double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kSumChunk)
    sum += dot_of_chunk(x + i, y + i, std::min(kSumChunk, n - i));
  return sum;
}

inline void subtract(double factor, const double* q, int64_t n, double* a) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) a[i] = a[i] - factor * q[i];
}

// Column c of some that lie m apart, the ones before it being orthonormal or zero: modified
// Gram-Schmidt. A column that adds nothing to those becomes zero.
template <class T>
inline void orthonormalise_column(double* columns, int64_t m, int64_t c) {
  double* a = columns + c * m;
  double length = std::sqrt(dot(a, a, m));
  for (int pass = 0; pass < kPasses<T>; ++pass) {
    for (int64_t before = 0; before < c; ++before) {
      const double* q = columns + before * m;
      subtract(dot(q, a, m), q, m, a);
    }
    const double left = std::sqrt(dot(a, a, m));
    if (!(left > kNothingLeft<T> * length)) {
      std::fill_n(a, m, 0.0);
      return;
    }
    const double factor = 1 / left;
    for (int64_t i = 0; i < m; ++i) a[i] *= factor;
    length = 1;
  }
}

// P, m x k row by row, as columns that lie m apart, each scaled to about 1: a column that has
// overflowed becomes zero.
template <class T>
inline void take_columns(const T* p, int64_t m, int64_t k, double* columns) {
  for (int64_t c = 0; c < k; ++c) {
    Key<T> largest = 0;  // NaN has a larger one than any number
    for (int64_t i = 0; i < m; ++i) largest = std::max(largest, key_of(p[i * k + c]));
    const double scale = scale_to_one(static_cast<double>(number_of<T>(largest)));
    double* a = columns + c * m;
    if (scale == 0) {
      std::fill_n(a, m, 0.0);
      continue;
    }
    for (int64_t i = 0; i < m; ++i) a[i] = static_cast<double>(p[i * k + c]) * scale;
  }
}

// P^ = orth(P), both m x k row by row; `columns` has room for m k numbers.
template <class T>
inline void orthonormalise(const T* p, int64_t m, int64_t k, double* columns, T* left) {
  take_columns(p, m, k, columns);
  for (int64_t c = 0; c < k; ++c) {
    orthonormalise_column<T>(columns, m, c);
    for (int64_t i = 0; i < m; ++i) left[i * k + c] = static_cast<T>(columns[c * m + i]);
  }
}

// The squared norm of a column of m numbers that lie `apart`.
template <class T>
inline double squares_of_column(const T* p, int64_t m, int64_t apart) {
  double squares = 0;
  double x[kSumChunk];
  for (int64_t i = 0; i < m; i += kSumChunk) {
    const int64_t some = std::min(kSumChunk, m - i);
    for (int64_t j = 0; j < some; ++j) x[j] = static_cast<double>(p[(i + j) * apart]);
    squares += dot_of_chunk(x, x, some);
  }
  return squares;
}

// A column of W: r at unit norm; zeros where r is zero or not finite.
template <class T>
inline void unit_column(const T* r, int64_t n, float* w) {
  Key<T> largest = 0;
  for (int64_t j = 0; j < n; ++j) largest = std::max(largest, key_of(r[j]));
  const double scale = scale_to_one(static_cast<double>(number_of<T>(largest)));
  if (scale == 0) {
    std::fill_n(w, n, 0.0f);
    return;
  }
  double squares = 0;
  double x[kSumChunk];
  for (int64_t i = 0; i < n; i += kSumChunk) {
    const int64_t some = std::min(kSumChunk, n - i);
    for (int64_t j = 0; j < some; ++j) x[j] = static_cast<double>(r[i + j]) * scale;
    squares += dot_of_chunk(x, x, some);
  }
  const double factor = scale / std::sqrt(squares);
  for (int64_t j = 0; j < n; ++j) w[j] = static_cast<float>(static_cast<double>(r[j]) * factor);
}

inline void draw_column(float* w, int64_t n, int64_t column, uint32_t stream, uint64_t seed,
                        uint64_t step) {
  for (int64_t j = 0; j < n; j += 4) {
    const Normals four = basis_normals(static_cast<uint32_t>(j / 4), static_cast<uint32_t>(column),
                                       stream, seed, step);
    std::copy_n(four.z, std::min<int64_t>(4, n - j), w + j);
  }
  unit_column(w, n, w);
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
