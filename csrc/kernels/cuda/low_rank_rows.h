// What low rank does to a band of rows: the passes over all of a matrix, but for products.h's
// X^T P^. Between steps the residual is own_a - P^ R_i^T.
#pragma once

#include "kernels/cuda/products.h"

namespace arc_topk::cuda {

// e = old - c, rounded as if it was stored; where that is not finite nothing was sent.
template <class T, class S>
ARC_TOPK_DEVICE T residual(const Array<S>& state, T old, T c) {
  const T e = state.rounded(old - c);
  return is_finite(e) ? e : old;
}

// The one pass over gradient and state: X_i, stored where this rank has used the tensor, and its
// product with W over a window. For more columns of W than fit into registers the message is read,
// or formed, again.
template <class G, class S, class T>
struct PrepareFactors {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = kVectorOf<T>;
  using RowSums = cuda::RowSums<T, kVector>;
  struct Shared {};

  Bucket b;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    const Band band(b, block.index());
    if (band.row_begin >= band.row_end) return;
    const Segment& s = band.s;
    const bool stores = remembers(b) && b.used[band.tile.segment] != 0;
    typename Block::template Each<bool> finite;
    block.each([&](int t) { finite[t] = true; });
    for (int64_t k = 0; k < s.kept; k += kFactorColumns) {
      const int64_t columns = smaller<int64_t>(s.kept - k, kFactorColumns);
      typename Block::template Each<RowSums> sums;
      block.each([&](int t) {
        sums[t] = {};
        finite[t] &= read(band, t, k, columns, stores, sums[t]);
      });
      block.group_sums(sums, kRowThreads);
      block.each([&](int t) {
        if (t % kRowThreads == 0 && band.row(t) < band.row_end)
          write(band, band.row(t), k, columns, sums[t]);
      });
    }
    block.each([&](int t) {
      if (!finite[t]) block.mark(b.bad + band.tile.segment, uint8_t{1});
    });
  }

 private:
  // Returns whether the message was finite.
  ARC_TOPK_DEVICE bool read(const Band& band, int t, int64_t k, int64_t columns, bool stores,
                            RowSums& sums) const {
    if (band.row(t) >= band.row_end) return true;
    const Segment& s = band.s;
    const Array<G> gradient(b.gradient, b.gradient_type);
    const Array<S> state(b.own_a, b.state_type);
    const T unscale = LossScale<T>(b).down;
    const int64_t stride = factor_stride(s.cols);
    const float* basis = basis_of(b, s) + k * stride;
    bool finite = true;
    if (!remembers(b)) {
      band.for_vectors<kVector>(t, [&](Run run, int64_t col) {
        T x[kVector];
        gradient.load(run, x);
        multiply(x, unscale);
        ARC_TOPK_UNROLL
        for (int j = 0; j < kVector; ++j) finite = finite && is_finite(x[j]);
        add_products(x, basis + col, stride, columns, sums);
      });
    } else if (k > 0 && stores) {
      band.for_vectors<kVector>(t, [&](Run run, int64_t col) {
        T x[kVector];
        state.load(run, x);  // as it was stored for the first columns
        add_products(x, basis + col, stride, columns, sums);
      });
    } else {
      const RowOfLeft<T> left(b, s, band.row(t));
      const T* right = right_of<T>(b, s);
      band.for_vectors<kVector>(t, [&](Run run, int64_t col) {
        T g[kVector];
        T x[kVector];
        T c[kVector];
        gradient.load(run, g);
        state.load(run, x);
        combine(left, right + col, stride, c);
        multiply(g, unscale);
        finite &= form(run, state, g, c, x);
        if (stores) state.store(run, x);
        add_products(x, basis + col, stride, columns, sums);
      });
    }
    return finite;
  }

  // x[], the state, becomes the message; where that is not finite the gradient is left out. Returns
  // whether all was.
  ARC_TOPK_DEVICE static bool form(Run run, const Array<S>& state, const T (&g)[kVector],
                                   const T (&c)[kVector], T (&x)[kVector]) {
    bool all_finite = true;
    ARC_TOPK_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const T e = residual(state, x[j], c[j]);
      const T message = state.rounded(e + g[j]);
      const bool finite = is_finite(message);
      all_finite = all_finite && finite;
      // C goes on behind the end of a tensor that is cut short, the message does not.
      x[j] = !run.has(j) ? T(0) : finite ? message : e;
    }
    return all_finite;
  }

  // P, or where it has several windows their sums, column by column.
  ARC_TOPK_DEVICE void write(const Band& band, int64_t row, int64_t k, int64_t columns,
                             const RowSums& sums) const {
    const Segment& s = band.s;
    const bool whole = s.cols <= kWindowCols;
    const int64_t window = band.tile.col_begin / kWindowCols;
    T* p = static_cast<T*>(b.first) + s.sketch + row * s.kept;
    T* parts = partial_of<T>(b, s, 0) + window * s.kept * s.rows + row;
    ARC_TOPK_UNROLL
    for (int c = 0; c < kFactorColumns; ++c) {
      if (c >= columns) continue;
      T& to = whole ? p[k + c] : parts[(k + c) * s.rows];
      to = sum_of_vector<T, kVector>(sums, c);
    }
  }
};

enum class SettleMode : uint8_t {
  kBetweenSteps,  // own_a = e_i
  kCommit,        // what the outcome of a step demands of own_a
};

template <class T>
struct Settle {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = kVectorOf<T>;
  struct Shared {};

  Bucket b;
  SettleMode mode;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    const Band band(b, block.index());
    if (band.row_begin >= band.row_end) return;
    bool settles = true;
    bool undoes = false;
    if (mode == SettleMode::kCommit) {
      const Outcome outcome = read_outcome(b, band.s, nullptr);
      const bool stored = b.used[band.tile.segment] != 0;
      // Used by some other rank: the message is the residual, for the gradient is zero here.
      settles = !stored && outcome == Outcome::kNormal;
      undoes = stored && outcome == Outcome::kNonFinite;
    }
    if (settles) {
      settle(block, band);
    } else if (undoes) {
      undo(block, band);
    }
  }

 private:
  template <class Block>
  ARC_TOPK_DEVICE void settle(Block& block, const Band& band) const {
    const Array<AnyType> state(b.own_a, b.state_type);
    const T* right = right_of<T>(b, band.s);
    const int64_t stride = factor_stride(band.s.cols);
    block.each([&](int t) {
      if (band.row(t) >= band.row_end) return;
      const RowOfLeft<T> left(b, band.s, band.row(t));
      band.for_vectors<kVector>(t, [&](Run run, int64_t col) {
        T e[kVector];
        T c[kVector];
        state.load(run, e);
        combine(left, right + col, stride, c);
        ARC_TOPK_UNROLL
        for (int j = 0; j < kVector; ++j) e[j] = residual(state, e[j], c[j]);
        state.store(run, e);
      });
    });
  }

  // The message, of which R_i is zero, less the gradient.
  template <class Block>
  ARC_TOPK_DEVICE void undo(Block& block, const Band& band) const {
    const Arrays<EF14, AnyType, AnyType, T> arrays(b, LossScale<T>(b));
    block.each([&](int t) {
      band.for_vectors<kVector>(t, [&](Run run, int64_t) {
        Values<T, kVector> e;
        T x[kVector];
        arrays.load(run, e);
        cuda::undo(EF14{}, arrays.a, e, x);
        arrays.a.store(run, x);
      });
    });
  }
};

// C, into the gradient. Of other outcomes Apply writes the result.
template <class T>
struct Combine {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = kVectorOf<T>;
  struct Shared {};

  Bucket b;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    const Band band(b, block.index());
    if (band.row_begin >= band.row_end) return;
    if (b.outcome[band.tile.segment] != Outcome::kNormal) return;
    const Array<AnyType> gradient(b.gradient, b.gradient_type);
    const T* right = partial_of<T>(b, band.s, 0);
    const int64_t stride = factor_stride(band.s.cols);
    const T scale = LossScale<T>(b).up;
    block.each([&](int t) {
      if (band.row(t) >= band.row_end) return;
      const RowOfLeft<T> left(b, band.s, band.row(t));
      band.for_vectors<kVector>(t, [&](Run run, int64_t col) {
        T c[kVector];
        combine(left, right + col, stride, c);
        multiply(c, scale);
        gradient.store(run, c);
      });
    });
  }
};

}  // namespace arc_topk::cuda
