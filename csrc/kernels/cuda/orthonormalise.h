// P^ = orth(P), one block a matrix: modified Gram-Schmidt in double, the CPU's step by step and to
// its bits. Cholesky QR would read P fewer times, but what is left of a column that adds nothing is
// found from its square there, which takes twice the digits: double would not do for double.
//
// P is m x k of a message's m x n, so what is read here again and again is small, and lies in the
// L2 cache. A column's part along one before it is taken off in the pass that measures its part
// along the next: k (k + 1) / 2 passes over a column in all.
#pragma once

#include "kernels/cuda/columns.h"
#include "kernels/cuda/message.h"
#include "kernels/directions.h"

namespace arc_topk::cuda {

template <class T>
struct Orthonormalise {
  static constexpr int kThreads = 512;
  using Shared = ColumnShared<T, kThreads>;

  Bucket b;
  Levels<T> levels;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const int64_t segment = block.index();
    const Segment& s = b.segments[segment];
    if (!s.compressed()) return;
    const Outcome outcome = read_outcome(b, s, nullptr);
    block.each([&](int t) {
      if (t == 0) b.outcome[segment] = outcome;
    });
    if (outcome != Outcome::kNormal) return;
    if (b.used[segment] == 0) forget(block, s);
    double* columns = Scratch(b).columns + place_of(b, s).left;
    T* left = left_of<T>(b, s);
    for (int64_t c = 0; c < s.kept; ++c) {
      take_column(block, shared, s, c, columns + c * s.rows);
      orthonormalise_column(block, shared, columns, s.rows, c);
      block.each([&](int t) {
        for_own<kThreads>(s.rows, t, [&](int64_t i) {
          left[i * s.kept + c] = static_cast<T>(columns[c * s.rows + i]);
        });
      });
    }
  }

 private:
  // The residual was written down in the launch before: R_i = 0.
  template <class Block>
  ARC_TOPK_DEVICE void forget(Block& block, const Segment& s) const {
    if (!remembers(b)) return;
    T* right = right_of<T>(b, s);
    block.each([&](int t) {
      for (int64_t i = t; i < s.kept * factor_stride(s.cols); i += kThreads) right[i] = T(0);
    });
  }

  // A column of P, on an uint8 wire from the sums of directions, scaled to about 1: one that has
  // overflowed becomes zero.
  template <class Block>
  ARC_TOPK_DEVICE void take_column(Block& block, Shared& shared, const Segment& s, int64_t c,
                                   double* a) const {
    T* p = static_cast<T*>(b.first) + s.sketch + c;
    if (sends_directions(b)) {
      const uint8_t* sums = directions_of(b, s, c);
      block.each([&](int t) {
        for_own<kThreads>(s.rows, t, [&](int64_t i) {
          p[i * s.kept] = s.rows == 1 ? T(1) : levels.mean_level(static_cast<T>(sums[i]));
        });
      });
    }
    const double scale =
        scale_of_column<T>(block, shared, s.rows, [&](int64_t i) { return p[i * s.kept]; });
    block.each([&](int t) {
      for_own<kThreads>(s.rows, t, [&](int64_t i) {
        a[i] = scale == 0 ? 0.0 : static_cast<double>(p[i * s.kept]) * scale;
      });
    });
  }

  // a -= factor q, unless q is null; then y a.
  template <class Block>
  ARC_TOPK_DEVICE static double subtract_and_multiply(Block& block, Shared& shared, int64_t m,
                                                      double factor, const double* q,
                                                      const double* y, double* a) {
    return sum_of_column(block, shared, m, [&]<int kHas>(int64_t i, Many<kHas>, double(&x)[kHas]) {
      double ys[kHas];
      double qs[kHas] = {};
      ARC_TOPK_UNROLL
      for (int j = 0; j < kHas; ++j) {
        x[j] = a[i + 32 * j];
        ys[j] = y[i + 32 * j];
        if (q != nullptr) qs[j] = q[i + 32 * j];
      }
      ARC_TOPK_UNROLL
      for (int j = 0; j < kHas; ++j) {
        if (q != nullptr) {
          x[j] = x[j] - factor * qs[j];
          a[i + 32 * j] = x[j];
        }
        x[j] = (y == a ? x[j] : ys[j]) * x[j];
      }
    });
  }

  // As the CPU's. All threads know all sums, and go the same way.
  template <class Block>
  ARC_TOPK_DEVICE static void orthonormalise_column(Block& block, Shared& shared, double* columns,
                                                    int64_t m, int64_t c) {
    double* a = columns + c * m;
    double length = std::sqrt(subtract_and_multiply(block, shared, m, 0, nullptr, a, a));
    for (int pass = 0; pass < kPasses<T>; ++pass) {
      double along = 0;
      const double* before = nullptr;
      for (int64_t next = 0; next <= c; ++next) {
        const double* y = columns + next * m;
        along = subtract_and_multiply(block, shared, m, along, before, y, a);
        before = y;
      }
      const double left = std::sqrt(along);
      const bool adds = left > kNothingLeft<T> * length;
      const double factor = adds ? 1 / left : 0;
      block.each([&](int t) {
        for_own<kThreads>(m, t, [&](int64_t i) { a[i] = adds ? a[i] * factor : 0.0; });
      });
      if (!adds) return;
      length = 1;
    }
  }
};

}  // namespace arc_topk::cuda
