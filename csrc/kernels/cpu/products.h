// The three products of low rank, over stretches that stay in the caches:
//
//   combine()       C = P^ R^T, some rows at a time
//   project_rows()  X W, some rows at a time
//   gather_rows()   X^T P^, added up over the rows of a tile
//
// Columns of W and R lie `stride` apart, P^ row by row. Elements of C are summed column after
// column: the same bits from every instruction set.
#pragma once

#include <algorithm>

#include "kernels/cpu/lanes.h"
#include "kernels/kernels.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// Rows and columns of a matrix that are worked on at a time: a few arrays of that size, and as many
// elements of some columns of W and R, lie in the L1 cache.
constexpr int64_t kBlockRows = 4;
constexpr int64_t kBlockCols = kWindowCols;

template <class T>
using Register = typename Wide<T, kRegisterBytes>::Register;
template <class T>
constexpr int64_t kRegisterWidth = kRegisterBytes / sizeof(T);

template <class T>
[[gnu::always_inline]] inline Register<T> load_register(const T* from) {
  return Wide<T, kRegisterBytes>::load(from).lanes;
}
template <class T>
[[gnu::always_inline]] inline void store_register(const Register<T>& x, T* to) {
  std::memcpy(to, &x, kRegisterBytes);
}

// --- C = P^ R^T
// -----------------------------------------------------------------------------------

// Two registers of each row: enough sums side by side to hide how long an addition takes.
template <int kRows, int kRegisters, class T>
[[gnu::always_inline]] inline void combine_registers(const T* left, int64_t k, const T* right,
                                                     int64_t stride, int64_t j, T* const* out) {
  constexpr int64_t kWidth = kRegisterWidth<T>;
  Register<T> sum[kRows][kRegisters] = {};
  for (int64_t c = 0; c < k; ++c) {
    Register<T> r[kRegisters];
#pragma GCC unroll 2
    for (int q = 0; q < kRegisters; ++q) r[q] = load_register(right + c * stride + j + q * kWidth);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int q = 0; q < kRegisters; ++q) sum[i][q] = sum[i][q] + left[i * k + c] * r[q];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int q = 0; q < kRegisters; ++q) store_register<T>(sum[i][q], out[i] + j + q * kWidth);
  }
}

template <int kRows, class T>
inline void combine_rows(const T* left, int64_t k, const T* right, int64_t stride, int64_t n,
                         T* const* out) {
  constexpr int64_t kWidth = kRegisterWidth<T>;
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth)
    combine_registers<kRows, 2>(left, k, right, stride, j, out);
  for (; j + kWidth <= n; j += kWidth) combine_registers<kRows, 1>(left, k, right, stride, j, out);
  for (; j < n; ++j) {
    for (int i = 0; i < kRows; ++i) {
      T sum = 0;
      for (int64_t c = 0; c < k; ++c) sum = sum + left[i * k + c] * right[c * stride + j];
      out[i][j] = sum;
    }
  }
}

// out[i][j] = sum over c of left[i][c] right[c][j], for `rows` <= kBlockRows rows, n columns.
template <class T>
inline void combine(const T* left, int64_t k, const T* right, int64_t stride, int64_t rows,
                    int64_t n, T* const* out) {
  if (rows == kBlockRows) return combine_rows<kBlockRows>(left, k, right, stride, n, out);
  for (int64_t i = 0; i < rows; ++i) combine_rows<1>(left + i * k, k, right, stride, n, out + i);
}

// --- X W
// ------------------------------------------------------------------------------------------

template <int kRows, int kCols, class T>
inline void project_columns(const T* const* x, int64_t n, const float* w, int64_t stride,
                            bool begins, int64_t k, T* p) {
  constexpr int64_t kWidth = Lanes<T>::kWidth;
  Lanes<T> sum[kRows * kCols] = {};
  const auto add = [&](const auto& x_lanes, const auto& w_lanes) __attribute__((always_inline)) {
    Lanes<T> ws[kCols];
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) ws[c] = w_lanes(c);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Lanes<T> xs = x_lanes(i);
#pragma GCC unroll 4
      for (int c = 0; c < kCols; ++c) sum[i * kCols + c].add_product(xs, ws[c]);
    }
  };
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    add([&](int i) { return load_lanes<T>(x[i] + j); },
        [&](int c) { return load_lanes<T>(w + c * stride + j); });
  }
  if (j < n) {
    add([&](int i) { return load_some_lanes<T>(x[i] + j, n - j); },
        [&](int c) { return load_some_lanes<T>(w + c * stride + j, n - j); });
  }
  for (int i = 0; i < kRows; ++i) {
    T sums[kCols];
    if constexpr (kCols == 4) {
      sum_lanes_of_four(sum + i * kCols, sums);
    } else {
      for (int c = 0; c < kCols; ++c) sums[c] = sum_lanes(sum[i * kCols + c]);
    }
    for (int c = 0; c < kCols; ++c) p[i * k + c] = begins ? sums[c] : p[i * k + c] + sums[c];
  }
}

template <int kRows, class T>
inline void project_some(const T* const* x, int64_t n, const float* w, int64_t stride, bool begins,
                         int64_t k, T* p) {
  int64_t c = 0;
  for (; c + 4 <= k; c += 4)
    project_columns<kRows, 4>(x, n, w + c * stride, stride, begins, k, p + c);
  for (; c < k; ++c) project_columns<kRows, 1>(x, n, w + c * stride, stride, begins, k, p + c);
}

// p[i][c], k apart, = sum over j of x[i][j] w[c][j], or += where it does not begin there.
template <class T>
inline void project_rows(const T* const* x, int64_t rows, int64_t n, const float* w, int64_t stride,
                         bool begins, int64_t k, T* p) {
  // Sixteen sets of lanes stay in registers only where one register holds one.
  if (kRegisterBytes == 64 && rows == kBlockRows) {
    return project_some<kBlockRows>(x, n, w, stride, begins, k, p);
  }
  for (int64_t i = 0; i < rows; ++i) {
    project_some<1>(x + i, n, w, stride, begins, k, p + i * k);
  }
}

// --- X^T P^
// ---------------------------------------------------------------------------------------

constexpr int64_t kTallRows = 8;  // of X, whose elements meet sums that are loaded once for all

template <int kCols, int kRegisters, class T>
[[gnu::always_inline]] inline void gather_registers(const T* const* x, int64_t rows, const T* left,
                                                    int64_t k, int64_t j, T* sums, int64_t stride) {
  constexpr int64_t kWidth = kRegisterWidth<T>;
  Register<T> sum[kCols][kRegisters];
#pragma GCC unroll 4
  for (int c = 0; c < kCols; ++c) {
#pragma GCC unroll 2
    for (int q = 0; q < kRegisters; ++q)
      sum[c][q] = load_register(sums + c * stride + j + q * kWidth);
  }
  for (int64_t i = 0; i < rows; ++i) {
    Register<T> xs[kRegisters];
#pragma GCC unroll 2
    for (int q = 0; q < kRegisters; ++q) xs[q] = load_register(x[i] + j + q * kWidth);
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) {
#pragma GCC unroll 2
      for (int q = 0; q < kRegisters; ++q) sum[c][q] = sum[c][q] + left[i * k + c] * xs[q];
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kCols; ++c) {
#pragma GCC unroll 2
    for (int q = 0; q < kRegisters; ++q)
      store_register<T>(sum[c][q], sums + c * stride + j + q * kWidth);
  }
}

template <int kCols, class T>
inline void gather_columns(const T* const* x, int64_t rows, int64_t n, const T* left, int64_t k,
                           T* sums, int64_t stride) {
  constexpr int64_t kWidth = kRegisterWidth<T>;
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth)
    gather_registers<kCols, 2>(x, rows, left, k, j, sums, stride);
  for (; j + kWidth <= n; j += kWidth)
    gather_registers<kCols, 1>(x, rows, left, k, j, sums, stride);
  for (; j < n; ++j) {
    for (int c = 0; c < kCols; ++c) {
      T sum = sums[c * stride + j];
      for (int64_t i = 0; i < rows; ++i) sum = sum + left[i * k + c] * x[i][j];
      sums[c * stride + j] = sum;
    }
  }
}

// sums[c][j] += sum over i of left[i][c] x[i][j], for `rows` <= kTallRows rows, one after the
// other.
template <class T>
inline void gather_rows(const T* const* x, int64_t rows, int64_t n, const T* left, int64_t k,
                        T* sums, int64_t stride) {
  int64_t c = 0;
  for (; c + 4 <= k; c += 4) gather_columns<4>(x, rows, n, left + c, k, sums + c * stride, stride);
  for (; c < k; ++c) gather_columns<1>(x, rows, n, left + c, k, sums + c * stride, stride);
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
