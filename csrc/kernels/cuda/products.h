// Low rank's three products, each in the CPU's order and so to its bits:
//
//   combine()        a vector of C = P^ R^T
//   RowSums          a row of X W
//   MultiplyBack     X^T P^ over a strip of rows
//
// The first two work on bands: some rows of a tile, four threads a row. These read vectors that are
// neighbours, which are the CPU's lanes (cpu/lanes.h), and the eight rows of a warp read the same
// elements of W and R at the same time: one read from the L1 cache, where a tile's columns of them
// stay, so that shared memory would gain nothing.
#pragma once

#include "kernels/cuda/message.h"
#include "kernels/factors.h"

namespace arc_topk::cuda {

constexpr int kFactorColumns = 8;  // of W, R or P^ at a time
constexpr int kRowThreads = 4;
constexpr int64_t kBandRows = kThreads / kRowThreads;
constexpr int64_t kBands = kStripRows / kBandRows;  // of a tile

// Some rows of a tile, and what of them is thread t's: a part of one row.
struct Band {
  const Piece& tile;
  const Segment& s;
  int64_t row_begin;
  int64_t row_end;

  ARC_TOPK_DEVICE Band(const Bucket& b, int64_t index)
      : tile(b.factors.tiles[index / kBands]),
        s(b.segments[tile.segment]),
        row_begin(tile.row_begin + index % kBands * kBandRows),
        row_end(smaller<int64_t>(row_begin + kBandRows, tile.row_end)) {}

  ARC_TOPK_DEVICE int64_t row(int t) const { return row_begin + t / kRowThreads; }

  // Calls f(run, col) for the vectors of thread t, one after the other: what lies within the
  // tensor, and its first element's column.
  template <int kVector, class F>
  ARC_TOPK_DEVICE void for_vectors(int t, const F& f) const {
    if (row(t) >= row_end) return;
    const int64_t start = s.offset + row(t) * s.cols;
    const int64_t end = smaller(start + tile.col_end, s.offset + s.numel);
    for (int64_t col = tile.col_begin + t % kRowThreads * kVector; col < tile.col_end;
         col += kRowThreads * kVector) {
      f(Run{start + col, 0, kVector}.before(end), col);
    }
  }
};
inline int64_t bands_of(const Bucket& b) { return b.factors.num_tiles * kBands; }

// A vector of some column of W or R, where it lies in the first one. Columns behind the last are
// read as the last, so that no branch lies between reads. They lie a multiple of sixteen elements
// apart: as so many sixteens a distance is one register, where an address for each column would be
// two.
template <class X, int kVector>
ARC_TOPK_DEVICE void load_column(const X* first, int column, int64_t columns, int64_t stride,
                                 X (&x)[kVector]) {
  constexpr int kBytes = kVector * sizeof(X);
  const auto sixteens = static_cast<uint32_t>(smaller<int64_t>(column, columns - 1)) *
                        static_cast<uint32_t>(stride / 16);
  copy_aligned<kBytes>(x, first + int64_t{sixteens} * 16);
}

// --- C = P^ R^T ----------------------------------------------------------------------------------

// P^ of a row: its first columns in registers.
template <class T>
struct RowOfLeft {
  const T* left;
  int64_t k;
  T first[kFactorColumns];

  ARC_TOPK_DEVICE RowOfLeft(const Bucket& b, const Segment& s, int64_t row)
      : left(left_of<T>(b, s) + row * s.kept), k(s.kept) {
    ARC_TOPK_UNROLL
    for (int c = 0; c < kFactorColumns; ++c) first[c] = c < k ? left[c] : T(0);
  }
};

// c[j] = sum over the columns of P^ and R, one after the other.
template <class T, int kVector>
ARC_TOPK_DEVICE void combine(const RowOfLeft<T>& p, const T* right, int64_t stride,
                             T (&c)[kVector]) {
  ARC_TOPK_UNROLL
  for (int j = 0; j < kVector; ++j) c[j] = T(0);
  ARC_TOPK_UNROLL
  for (int i = 0; i < kFactorColumns; ++i) {
    alignas(16) T r[kVector];
    load_column(right, i, p.k, stride, r);
    ARC_TOPK_UNROLL
    for (int j = 0; j < kVector; ++j) c[j] = i < p.k ? c[j] + p.first[i] * r[j] : c[j];
  }
  for (int64_t i = kFactorColumns; i < p.k; ++i) {
    alignas(16) T r[kVector];
    load_column(right + i * stride, 0, 1, stride, r);
    const T l = p.left[i];
    ARC_TOPK_UNROLL
    for (int j = 0; j < kVector; ++j) c[j] = c[j] + l * r[j];
  }
}

// --- X W -----------------------------------------------------------------------------------------

// The sums of a row over a window for some columns of W: one for each element of a vector, as the
// CPU's lanes.
template <class T, int kVector>
using RowSums = Sums<T, kFactorColumns * kVector>;

// Adds a vector's.
template <class T, int kVector>
ARC_TOPK_DEVICE void add_products(const T (&x)[kVector], const float* basis, int64_t stride,
                                  int64_t columns, RowSums<T, kVector>& sums) {
  ARC_TOPK_UNROLL
  for (int c = 0; c < kFactorColumns; ++c) {
    alignas(16) float w[kVector];
    load_column(basis, c, columns, stride, w);
    ARC_TOPK_UNROLL
    for (int j = 0; j < kVector; ++j) {
      T& sum = sums.value[c * kVector + j];
      sum = sum + x[j] * static_cast<T>(w[j]);
    }
  }
}

// Of a column, once the threads of a row are added up: the rest as sum_lanes() does it.
template <class T, int kVector>
ARC_TOPK_DEVICE T sum_of_vector(const RowSums<T, kVector>& sums, int c) {
  T lane[kVector];
  ARC_TOPK_UNROLL
  for (int j = 0; j < kVector; ++j) lane[j] = sums.value[c * kVector + j];
  ARC_TOPK_UNROLL
  for (int half = kVector / 2; half > 0; half /= 2) {
    ARC_TOPK_UNROLL
    for (int j = 0; j < half; ++j) lane[j] = lane[j] + lane[j + half];
  }
  return lane[0];
}

// --- X^T P^ --------------------------------------------------------------------------------------

// One block a tile, a vector of columns a thread: row after row, some of them read side by side.
template <class T>
struct MultiplyBack {
  static constexpr int kVector = kVectorOf<T>;
  static constexpr int kThreads = kWindowCols / kVector;
  static constexpr int kRows = 8;
  struct Shared {};

  Bucket b;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    const Piece& tile = b.factors.tiles[block.index()];
    const Segment& s = b.segments[tile.segment];
    if (b.outcome[tile.segment] != Outcome::kNormal) return;
    T* sums = partial_of<T>(b, s, tile.row_begin / kStripRows);
    block.each([&](int t) {
      const int64_t col = tile.col_begin + t * kVector;
      if (col >= tile.col_end) return;
      for (int64_t k = 0; k < s.kept; k += kFactorColumns) {
        if (remembers(b)) {
          with_type(b.state_type, [&]<class S>(S) {
            gather(Array<S>(b.own_a, b.state_type), T(1), s, tile, col, k, sums);
          });
        } else {
          with_type(b.gradient_type, [&]<class G>(G) {
            gather(Array<G>(b.gradient, b.gradient_type), LossScale<T>(b).down, s, tile, col, k,
                   sums);
          });
        }
      }
    });
  }

 private:
  template <class X>
  ARC_TOPK_DEVICE void gather(const Array<X>& message, T scale, const Segment& s, const Piece& tile,
                              int64_t col, int64_t k, T* sums) const {
    const auto columns = static_cast<int>(smaller<int64_t>(s.kept - k, kFactorColumns));
    const int64_t first = s.offset + col;
    const int64_t end = s.offset + s.numel;
    T sum[kFactorColumns][kVector] = {};
    for (int64_t row = tile.row_begin; row < tile.row_end; row += kRows) {
      T x[kRows][kVector];
      ARC_TOPK_UNROLL
      for (int i = 0; i < kRows; ++i) {
        // Of rows behind the last one nothing is read.
        const int64_t start = first + (row + i) * s.cols;
        const int64_t its_end = row + i < tile.row_end ? smaller(start - col + s.cols, end) : start;
        message.load(Run{start, 0, kVector}.before(its_end), x[i]);
        multiply(x[i], scale);
      }
      const T* left = left_of<T>(b, s) + row * s.kept + k;
      ARC_TOPK_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (row + i < tile.row_end) add(x[i], left + i * s.kept, columns, sum);
      }
    }
    const Array<T> to(sums, kTypeOf<T>);
    const int64_t stride = factor_stride(s.cols);
    ARC_TOPK_UNROLL
    for (int c = 0; c < kFactorColumns; ++c) {
      const Run run = Run{(k + c) * stride + col, 0, kVector}.before((k + c) * stride + s.cols);
      if (c < columns) to.store(run, sum[c]);
    }
  }

  // Columns of P^ behind the last are read as the last, and their sums not stored.
  ARC_TOPK_DEVICE static void add(const T (&x)[kVector], const T* left, int columns,
                                  T (&sum)[kFactorColumns][kVector]) {
    ARC_TOPK_UNROLL
    for (int c = 0; c < kFactorColumns; ++c) {
      const T l = left[smaller(c, columns - 1)];
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) sum[c][j] = sum[c][j] + l * x[j];
    }
  }
};

}  // namespace arc_topk::cuda
