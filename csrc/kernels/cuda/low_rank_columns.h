// What low rank does to a column of a factor, a block each; orthonormalise.h has what needs all of
// them.
#pragma once

#include "kernels/cuda/columns.h"
#include "kernels/cuda/message.h"
#include "kernels/directions.h"

namespace arc_topk::cuda {

// Behind PrepareFactors: a column of P from its windows, one after the other, and on an uint8 wire
// its direction; of R_i zeros, for the message holds all of the residual now; this rank's flags.
template <class T>
struct FinishPrepare {
  static constexpr int kThreads = cuda::kThreads;
  using Shared = ColumnShared<T, kThreads>;

  Bucket b;
  Levels<T> levels;

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
    if (sends_directions(b)) send_direction(block, shared, s, c, used);
  }

 private:
  // Nothing of what this rank has not used.
  template <class Block>
  ARC_TOPK_DEVICE void send_direction(Block& block, Shared& shared, const Segment& s, int64_t c,
                                      bool used) const {
    block.sync();
    const bool row = s.rows == 1;
    const T* p = static_cast<const T*>(b.first) + s.sketch + c;
    double squares = 0;
    if (used)
      squares = row ? squares_of_row(block, shared, s)
                    : squares_of_column(block, shared, p, s.rows, s.kept);
    const T norm = norm_of<T>(squares);
    block.each([&](int t) {
      if (t == 0) write_norms(norm, b.rank, b.world_size, norms_of(b, s, c));
    });
    if (row) return;
    const T inverse = inverse_of_direction(levels, norm, s.rows);
    uint8_t* to = directions_of(b, s, c);
    block.each([&](int t) {
      for (int64_t i = t; i < s.rows; i += kThreads)
        to[i] = byte_of_direction(levels, p[i * s.kept], inverse);
    });
  }

  // Of the message of a matrix of one row, which this rank has used.
  template <class Block>
  ARC_TOPK_DEVICE double squares_of_row(Block& block, Shared& shared, const Segment& s) const {
    const Array<AnyType> message = remembers(b) ? Array<AnyType>(b.own_a, b.state_type)
                                                : Array<AnyType>(b.gradient, b.gradient_type);
    const T unscale = remembers(b) ? T(1) : LossScale<T>(b).down;
    return sum_of_column(block, shared, s.cols,
                         [&]<int kHas>(int64_t i, Many<kHas>, double(&x)[kHas]) {
                           ARC_TOPK_UNROLL
                           for (int j = 0; j < kHas; ++j) {
                             T one[1];
                             message.load(Run{s.offset + i + 32 * j, 0, 1}, one);
                             x[j] = static_cast<double>(one[0] * unscale);
                             x[j] = x[j] * x[j];
                           }
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
  // D, for Receive as well.
  template <class Block>
  ARC_TOPK_DEVICE T make_unit(Block& block, Shared& shared, const Segment& s, int64_t c) const {
    const Norms norms = read_norms<T>(norms_of(b, s, c), b.world_size);
    const T* p = static_cast<const T*>(b.first) + s.sketch + c;
    const double squares = squares_of_column(block, shared, p, s.rows, s.kept);
    const T unit = s.rows == 1 ? unit_of_row(levels, norms, s.cols)
                               : unit_of_column(levels, norms, squares, s.rows, s.cols);
    block.each([&](int t) {
      if (t == 0) units_of<T>(b, s)[c] = unit;
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
