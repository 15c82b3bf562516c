// Low rank's steps but for the two that orthonormalise.h and products.h hold: what is done to a
// band of rows, and what to a column of a factor. Between steps the residual is own_a - P^ R_i^T.
#pragma once

#include "kernels/cuda/columns.h"
#include "kernels/cuda/products.h"
#include "kernels/levels.h"

namespace arc_topk::cuda {

// --- bands of rows
// --------------------------------------------------------------------------------

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

// --- columns of factors
// ---------------------------------------------------------------------------

// A number a column: on an uint8 wire the mean norm of P_i's, then D.
template <class T>
ARC_TOPK_DEVICE T* units_of(const Bucket& b, const Segment& s) {
  return static_cast<T*>(b.first) + s.units(s.kept);
}

// Behind PrepareFactors: a column of P from its windows, one after the other, and for an uint8 wire
// its norm; of R_i zeros, for the message holds all of the residual now; this rank's flags.
template <class T>
struct FinishPrepare {
  static constexpr int kThreads = cuda::kThreads;
  using Shared = ColumnShared<T, kThreads>;

  Bucket b;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Column column(b, block.index());
    const int64_t i = column.segment, c = column.c;
    const Segment& s = b.segments[i];
    const bool used = b.used[i] != 0;
    block.each([&](int t) {
      if (t != 0 || c != 0) return;
      b.outcome[i] = Outcome::kNormal;
      if (s.compressed()) write_flag(b, s.flag, used, b.bad[i] != 0);
    });
    if (c >= s.kept) return;
    const int64_t stride = factor_stride(s.cols);
    block.each([&](int t) {
      if (s.cols > kWindowCols) add_windows(s, c, t);
      if (!used || !remembers(b)) return;
      T* right = right_of<T>(b, s) + c * stride;
      for (int64_t j = t; j < stride; j += kThreads) right[j] = T(0);
    });
    if (sends_levels(b)) tell_norm(block, shared, s, c);
  }

 private:
  // This rank's share of the mean.
  template <class Block>
  ARC_TOPK_DEVICE void tell_norm(Block& block, Shared& shared, const Segment& s, int64_t c) const {
    block.sync();
    const T* p = static_cast<const T*>(b.first) + s.sketch + c;
    const double squares = squares_of_column(block, shared, p, s.rows, s.kept);
    block.each([&](int t) {
      if (t == 0) units_of<T>(b, s)[c] = static_cast<T>(std::sqrt(squares) / b.world_size);
    });
  }

  ARC_TOPK_DEVICE void add_windows(const Segment& s, int64_t c, int t) const {
    const T* parts = partial_of<T>(b, s, 0) + c * s.rows;
    const int64_t windows = divide_up(s.cols, kWindowCols);
    T* p = static_cast<T*>(b.first) + s.sketch + c;
    for (int64_t row = t; row < s.rows; row += kThreads) {
      T sum = parts[row];
      for (int64_t window = 1; window < windows; ++window)
        sum = sum + parts[window * s.kept * s.rows + row];
      p[row * s.kept] = sum;
    }
  }
};

// A column of R_i: the sums over strips, one after the other, to the wire, and as they are sent
// into the right factor. For an uint8 wire D before.
template <class T>
struct Send {
  static constexpr int kThreads = cuda::kThreads;
  using Shared = ColumnShared<T, kThreads>;

  Bucket b;
  Wire<T> wire;
  Levels<T> levels;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Column column(b, block.index());
    const Segment& s = b.segments[column.segment];
    if (column.c >= s.kept) return;
    const bool normal = b.outcome[column.segment] == Outcome::kNormal;
    const T unit = levels.used && normal ? make_unit(block, shared, s, column.c) : T(0);
    const T inverse = Levels<T>::inverse(unit);
    const int64_t stride = factor_stride(s.cols);
    const int64_t strips = divide_up(s.rows, kStripRows);
    const T* parts = partial_of<T>(b, s, 0) + column.c * stride;
    T* right = normal && remembers(b) ? right_of<T>(b, s) + column.c * stride : nullptr;
    block.each([&](int t) {
      for (int64_t j = t; j < s.cols; j += kThreads) {
        const Run to{s.packed + column.c * s.cols + j, 0, 1};
        const T x = normal ? sum(parts + j, strips, s.kept * stride) : T(0);
        const T finite = is_finite(x) ? x : T(0);
        const T sent = levels.used ? send_level(to, finite, unit, inverse) : send(to, finite);
        if (right != nullptr) right[j] = sent;
      }
    });
  }

 private:
  // The mean norm becomes D, for Receive as well.
  template <class Block>
  ARC_TOPK_DEVICE T make_unit(Block& block, Shared& shared, const Segment& s, int64_t c) const {
    T* units = units_of<T>(b, s);
    const T norm = units[c];
    const T* p = static_cast<const T*>(b.first) + s.sketch + c;
    const double ranks = b.world_size;
    const double squares = squares_of_column(block, shared, p, s.rows, s.kept) / (ranks * ranks);
    const T unit = levels.column_unit(norm, squares, s.rows, s.cols);
    block.each([&](int t) {
      if (t == 0) units[c] = unit;
    });
    return unit;
  }

  // Return what arrives of x.
  ARC_TOPK_DEVICE T send(Run to, T x) const {
    const Array<AnyType> payload(b.second, b.wire_type);
    T scaled[1] = {wire.sent(x)};
    payload.store(to, scaled);
    return wire.exact ? scaled[0] : wire.received(payload.rounded(scaled[0]));
  }
  ARC_TOPK_DEVICE T send_level(Run to, T x, T unit, T inverse) const {
    const T level = levels.level(x, inverse);
    const T bytes[1] = {level + levels.most};
    Array<uint8_t>(b.second, DType::kU8).store(to, bytes);
    return level * unit;
  }

  ARC_TOPK_DEVICE static T sum(const T* parts, int64_t strips, int64_t apart) {
    T sum = parts[0];
    for (int64_t strip = 1; strip < strips; ++strip) sum = sum + parts[strip * apart];
    return sum;
  }
};

// A column of R, the mean, and of W.
template <class T>
struct Receive {
  static constexpr int kThreads = cuda::kThreads;
  using Shared = ColumnShared<T, kThreads>;

  Bucket b;
  T factor;  // what a sum is multiplied with
  Levels<T> levels;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Column column(b, block.index());
    const Segment& s = b.segments[column.segment];
    if (column.c >= s.kept || b.outcome[column.segment] != Outcome::kNormal) return;
    const int64_t at = column.c * factor_stride(s.cols);
    T* r = partial_of<T>(b, s, 0) + at;
    const T unit_factor = levels.used ? levels.factor(units_of<T>(b, s)[column.c]) : T(0);
    block.each([&](int t) {
      for_own<kThreads>(s.cols, t, [&](int64_t i) {
        const Run from{s.packed + column.c * s.cols + i, 0, 1};
        r[i] = levels.used ? mean_of_bytes(from) * unit_factor : mean(from);
      });
    });
    unit_column(block, shared, r, s.cols, basis_of(b, s) + at);
  }

 private:
  ARC_TOPK_DEVICE T mean(Run from) const {
    T x[1];
    Array<AnyType>(b.second, b.wire_type).load(from, x);
    return x[0] * factor;
  }
  ARC_TOPK_DEVICE T mean_of_bytes(Run from) const {
    T sum[1];
    Array<uint8_t>(b.second, DType::kU8).load(from, sum);
    return levels.mean_level(sum[0]);
  }
};

// R_i = 0: own_a is the residual.
template <class T>
struct Forget {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {};

  Bucket b;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    const Column column(b, block.index());
    const Segment& s = b.segments[column.segment];
    if (column.c >= s.kept) return;
    const int64_t stride = factor_stride(s.cols);
    T* right = right_of<T>(b, s) + column.c * stride;
    block.each([&](int t) {
      for (int64_t j = t; j < stride; j += kThreads) right[j] = T(0);
    });
  }
};

// R_i -= R where the scaler has skipped the step.
template <class T>
struct ReclaimFactor {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {};

  Bucket b;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    if (!was_skipped(b)) return;
    const Column column(b, block.index());
    const Segment& s = b.segments[column.segment];
    if (column.c >= s.kept || b.outcome[column.segment] != Outcome::kNormal) return;
    const int64_t at = column.c * factor_stride(s.cols);
    const T* mean = partial_of<T>(b, s, 0) + at;
    T* right = right_of<T>(b, s) + at;
    block.each([&](int t) {
      for (int64_t j = t; j < s.cols; j += kThreads) {
        const T rest = right[j] - mean[j];
        right[j] = is_finite(rest) ? rest : right[j];
      }
    });
  }
};

}  // namespace arc_topk::cuda
