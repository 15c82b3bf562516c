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
#include "kernels/cpu/streamed.h"
#include "kernels/kernels.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// Rows and columns of a matrix that are worked on at a time: a few arrays of that size, and as many
// elements of some columns of W and R, lie in the nearest caches. Most rows are no longer, and
// rows read whole are one stream from memory.
constexpr int64_t kBlockRows = 4;
constexpr int64_t kBlockCols = 2 * kWindowCols;

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

enum class Put { kInCaches, kPastCaches };

// Rows of two arrays that are read right behind, at the same places, `stride` elements apart; they
// come while products are formed. Null: none.
template <class T>
struct ReadNext {
  const T* a = nullptr;
  const T* b = nullptr;
  int64_t stride = 0;

  [[gnu::always_inline]] void fetch(int64_t row, int64_t j) const {
    if (a == nullptr) return;
    const int64_t bytes = (row * stride + j) * static_cast<int64_t>(sizeof(T));
    prefetch(a, bytes);
    prefetch(b, bytes);
  }
};

// Two registers of each row: enough sums side by side to hide how long an addition takes.
template <int kRows, int kRegisters, Put kPut, class T>
[[gnu::always_inline]] inline void combine_registers(const T* left, int64_t k, const T* right,
                                                     int64_t stride, int64_t j, T* const* out,
                                                     const ReadNext<T>& next) {
  constexpr int64_t kWidth = kRegisterWidth<T>;
  Register<T> sum[kRows][kRegisters] = {};
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int q = 0; q < kRegisters; ++q) next.fetch(i, j + q * kWidth);
  }
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
    for (int q = 0; q < kRegisters; ++q) {
      T* to = out[i] + j + q * kWidth;
      kPut == Put::kPastCaches ? stream_register(sum[i][q], to) : store_register<T>(sum[i][q], to);
    }
  }
}

template <int kRows, Put kPut, class T>
inline void combine_rows(const T* left, int64_t k, const T* right, int64_t stride, int64_t n,
                         T* const* out, const ReadNext<T>& next) {
  constexpr int64_t kWidth = kRegisterWidth<T>;
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth)
    combine_registers<kRows, 2, kPut>(left, k, right, stride, j, out, next);
  for (; j + kWidth <= n; j += kWidth)
    combine_registers<kRows, 1, kPut>(left, k, right, stride, j, out, next);
  for (; j < n; ++j) {
    for (int i = 0; i < kRows; ++i) {
      T sum = 0;
      for (int64_t c = 0; c < k; ++c) sum = sum + left[i * k + c] * right[c * stride + j];
      out[i][j] = sum;
    }
  }
}

// out[i][j] = sum over c of left[i][c] right[c][j], for `rows` <= kBlockRows rows, n columns. Past
// the caches: n is whole registers, and out aligned to them.
template <Put kPut = Put::kInCaches, class T>
inline void combine(const T* left, int64_t k, const T* right, int64_t stride, int64_t rows,
                    int64_t n, T* const* out, const ReadNext<T>& next = {}) {
  if (rows == kBlockRows)
    return combine_rows<kBlockRows, kPut>(left, k, right, stride, n, out, next);
  for (int64_t i = 0; i < rows; ++i)
    combine_rows<1, kPut>(left + i * k, k, right, stride, n, out + i, ReadNext<T>{});
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
                                                    int64_t k, int64_t j, T* sums, int64_t stride,
                                                    int64_t ahead) {
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
    for (int q = 0; q < kRegisters; ++q) {
      xs[q] = load_register(x[i] + j + q * kWidth);
      prefetch(x[i] + j + q * kWidth, ahead);
    }
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
                           T* sums, int64_t stride, int64_t ahead) {
  constexpr int64_t kWidth = kRegisterWidth<T>;
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth)
    gather_registers<kCols, 2>(x, rows, left, k, j, sums, stride, ahead);
  for (; j + kWidth <= n; j += kWidth)
    gather_registers<kCols, 1>(x, rows, left, k, j, sums, stride, ahead);
  for (; j < n; ++j) {
    for (int c = 0; c < kCols; ++c) {
      T sum = sums[c * stride + j];
      for (int64_t i = 0; i < rows; ++i) sum = sum + left[i * k + c] * x[i][j];
      sums[c * stride + j] = sum;
    }
  }
}

// sums[c][j] += sum over i of left[i][c] x[i][j], for `rows` <= kTallRows rows, one after the
// other. The rows of the next call lie `ahead` bytes behind these.
template <class T>
inline void gather_rows(const T* const* x, int64_t rows, int64_t n, const T* left, int64_t k,
                        T* sums, int64_t stride, int64_t ahead) {
  int64_t c = 0;
  for (; c + 4 <= k; c += 4)
    gather_columns<4>(x, rows, n, left + c, k, sums + c * stride, stride, ahead);
  for (; c < k; ++c) gather_columns<1>(x, rows, n, left + c, k, sums + c * stride, stride, ahead);
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
