// What came back from the wire, into the shared estimate or the gradient.
#pragma once

#include "kernels/cpu/pack.h"
#include "kernels/cpu/streamed.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// What a payload's sum is multiplied with to give the mean.
template <class T>
inline T mean_factor(const Bucket& b) {
  return static_cast<T>(1.0 / b.wire_scale / b.world_size);
}

inline void fill_zero(void* base, DType type, Range range) {
  const int64_t size = size_of(type);
  std::memset(byte_offset(base, range.begin * size), 0,
              static_cast<size_t>((range.end - range.begin) * size));
}

inline void fill_nan(void* base, DType type, Range range) {
  with_type(type, [&]<class S>(S) {
    const S nan = narrow_to<S>(std::numeric_limits<float>::quiet_NaN());
    std::fill(static_cast<S*>(base) + range.begin, static_cast<S*>(base) + range.end, nan);
  });
}

// The gradient of a compressed tensor in which nothing arrived.
inline void fill_empty(const Bucket& b, Outcome outcome, Range range) {
  if (shares_estimate(b.feedback)) return;
  if (outcome == Outcome::kNonFinite) {
    fill_nan(b.gradient, b.gradient_type, range);
  } else {
    fill_zero(b.gradient, b.gradient_type, range);
  }
}

template <class T>
inline void add_to_estimate(const T* mean, int64_t n, T* h) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) h[i] = h[i] + mean[i];
}

// --- compressed, reduced
// ----------------------------------------------------------------------------

// The gradient from its picked rows: they, and zeros before, between and behind them.
class PickedAndZeros {
 public:
  PickedAndZeros(const Bucket& b, const Piece& p)
      : b_(b),
        gradient_(b),
        by_row_(gradient_.past_caches() &&
                segment_of(b, p).cols * size_of(b.gradient_type) >= kStreamedRun),
        at_(range_of(b, p).begin),
        end_(range_of(b, p).end) {}

  // The next ones. Zeros below short rows cost less than to stop for each of them.
  template <class T>
  void put(const T* mean, const Stretches& x) {
    const int64_t behind = start(x, x.count - 1) + x.valid(x.count - 1);
    if (by_row_ || x.count == 1) {
      for (int64_t k = 0; k < x.count; ++k) {
        gradient_.zero(at_, start(x, k));
        gradient_.put(mean + k * x.length, start(x, k), x.valid(k));
        at_ = start(x, k) + x.valid(k);
      }
    } else {
      fill_zero(b_.gradient, b_.gradient_type, {at_, behind});
      scatter(mean, b_.gradient, b_.gradient_type, x);
    }
    at_ = behind;
  }
  void put_rest() const { gradient_.zero(at_, end_); }

 private:
  // Parts of a long row may lie beyond the end of the tensor that cuts it short.
  int64_t start(const Stretches& x, int64_t k) const { return std::min(x.start(k), end_); }

  const Bucket& b_;
  const GradientWriter gradient_;
  const bool by_row_;
  int64_t at_;
  const int64_t end_;
};

inline double apply(const Bucket& b, const Piece& p) {
  const Outcome outcome = b.outcome[p.segment];
  if (outcome != Outcome::kNormal) {
    fill_empty(b, outcome, range_of(b, p));
    return 0;
  }
  return with_work_type(b, [&]<class T>(T) {
    const bool shared = shares_estimate(b.feedback);
    const Segment& s = segment_of(b, p);
    const T factor = mean_factor<T>(b);
    Buffers<T> buffers;
    SumOfSquares<T> squares;
    PickedAndZeros gradient(b, p);
    for_picked(b, p, [&](const Stretches& picked, int64_t at) {
      const int64_t n = picked.numel();
      T* mean = buffers.x;
      if (sends_levels(b)) {
        mean_of_levels(b, s, picked, at, mean);
      } else {
        const T* sum = load(b.second, b.wire_type, s.packed + at, n, buffers.g);
        for (int64_t i = 0; i < n; ++i) mean[i] = sum[i] * factor;
      }
      squares.add(mean, n);
      if (shared) {
        T* h = gather(b.shared, b.state_type, picked, buffers.a);
        add_to_estimate(mean, n, h);
        scatter(h, b.shared, b.state_type, picked);
      } else {
        scale_up(b, mean, n);
        gradient.put(mean, picked);
      }
    });
    if (!shared) gradient.put_rest();
    return squares.value();
  });
}

// --- compressed, gathered (Top-K)
// -------------------------------------------------------------------

// Adds one rank's elements in rows [begin, end) to sum[].
template <class T>
inline void add_sparse(const void* picks, const void* values, DType type, int64_t count,
                       int64_t begin, int64_t end, T scale, T* sum) {
  with_type(type, [&]<class W>(W) {
    for (int64_t k = first_pick(picks, count, begin); k < count; ++k) {
      const int64_t row = read<int32_t>(picks, k);
      if (row >= end) return;
      sum[row - begin] += widen_to<T>(read<W>(values, k)) * scale;
    }
  });
}

inline int64_t distance(const void* from, const void* to) {
  return static_cast<const char*>(to) - static_cast<const char*>(from);
}

inline double apply_gathered(const Bucket& b, const Piece& p, const void* message,
                             const void* gathered, int64_t stride) {
  const Outcome outcome = b.outcome[p.segment];
  if (outcome != Outcome::kNormal) {
    fill_empty(b, outcome, range_of(b, p));
    return 0;
  }
  return with_work_type(b, [&]<class T>(T) {
    constexpr int64_t kBlock = 8 * kChunk;  // each costs a binary search in every rank's picks
    alignas(64) T sum[kBlock];
    Buffers<T> buffers;
    SumOfSquares<T> squares;
    const Segment& s = segment_of(b, p);
    const bool shared = shares_estimate(b.feedback);
    const GradientWriter gradient(b);
    const T scale = static_cast<T>(scale_of_sum(b.world_size));
    const T factor = mean_factor<T>(b) / scale;
    const int64_t picks_at = distance(message, b.picks + s.pick);
    const int64_t values_at = distance(message, b.second) + s.packed * size_of(b.wire_type);
    for (int64_t begin = p.row_begin; begin < p.row_end; begin += kBlock) {
      const int64_t end = std::min<int64_t>(begin + kBlock, p.row_end);
      std::fill_n(sum, end - begin, T(0));
      for (int64_t rank = 0; rank < b.world_size; ++rank) {
        const void* theirs = byte_offset(gathered, rank * stride);
        add_sparse(byte_offset(theirs, picks_at), byte_offset(theirs, values_at), b.wire_type,
                   s.kept, begin, end, scale, sum);
      }
      for (int64_t i = 0; i < end - begin; ++i) sum[i] *= factor;
      squares.add(sum, end - begin);
      for_chunks({begin, end}, [&](int64_t row, int64_t n) {
        T* mean = sum + (row - begin);
        if (!shared) {
          scale_up(b, mean, n);
          return gradient.put(mean, s.offset + row, n);
        }
        T* h = load(b.shared, b.state_type, s.offset + row, n, buffers.a);
        add_to_estimate(mean, n, h);
        store(h, b.shared, b.state_type, s.offset + row, n);
      });
    }
    return squares.value();
  });
}

// --- dense
// ------------------------------------------------------------------------------------------

// Where the mean of a dense tensor comes from: see mark_dense() in rows.h.
struct Source {
  int64_t shift;
  int64_t copies;
  int64_t stride;
};

// Elements [i, i + n) of the bucket, averaged, into mean[]. At the gradient's scale, but for h at
// h's.
template <class T>
inline void average(const Bucket& b, const Segment& s, const Source& source, int64_t i, int64_t n,
                    T* mean) {
  alignas(64) T buffer[kChunk];
  if (source.copies == 0) {
    const T* g = load(b.gradient, b.gradient_type, i, n, buffer);
    std::copy_n(g, n, mean);
    if (shares_estimate(b.feedback)) unscaled(b, mean, n, mean);
    return;
  }
  const DType type = s.dense_in_first ? kTypeOf<T> : b.wire_type;
  const int64_t at = (s.packed + i - s.offset) * size_of(type);
  void* own = byte_offset(s.dense_in_first ? b.first : b.second, at + source.shift);
  alignas(64) char aligned[kChunk * 8];
  std::fill_n(mean, n, T(0));
  // A payload was summed on its way.
  const T scale = source.copies == 1 ? T(1) : static_cast<T>(scale_of_sum(b.world_size));
  for (int64_t copy = 0; copy < source.copies; ++copy) {
    std::memcpy(aligned, byte_offset(own, copy * source.stride),
                static_cast<size_t>(n * size_of(type)));
    const T* x = load(aligned, type, 0, n, buffer);
    for (int64_t j = 0; j < n; ++j) mean[j] += x[j] * scale;
  }
  const T factor = mean_factor<T>(b) / scale;
  for (int64_t j = 0; j < n; ++j) mean[j] *= factor;
  if (shares_estimate(b.feedback)) unscaled(b, mean, n, mean);
}

inline Marks mark_dense(const Bucket& b, const Piece& p, int64_t shift, int64_t copies,
                        int64_t stride) {
  return with_work_type(b, [&]<class T>(T) {
    Marks marks{};
    alignas(64) T mean[kChunk];
    for_chunks(range_of(b, p), [&](int64_t i, int64_t n) {
      average(b, segment_of(b, p), {shift, copies, stride}, i, n, mean);
      int nonzero = 0;
      int nonfinite = 0;
      for (int64_t j = 0; j < n; ++j) {
        nonzero |= key_of(mean[j]) != 0;
        nonfinite |= !is_finite(mean[j]);
      }
      marks.nonzero |= nonzero != 0;
      marks.nonfinite |= nonfinite != 0;
    });
    return marks;
  });
}

inline void apply_dense(const Bucket& b, const Piece& p, int64_t shift, int64_t copies,
                        int64_t stride) {
  const bool shared = shares_estimate(b.feedback);
  const Outcome outcome = b.outcome[p.segment];
  if (shared && outcome == Outcome::kNonFinite) return;
  // The momentum of a tensor that nobody used stays; without momentum h is the mean, zero or not.
  if (has_momentum(b.feedback) && outcome == Outcome::kUnused) return;
  with_work_type(b, [&]<class T>(T) {
    const T eta = static_cast<T>(b.eta);
    const T keep = static_cast<T>(1 - b.eta);
    const GradientWriter gradient(b);
    Buffers<T> buffers;
    for_chunks(range_of(b, p), [&](int64_t i, int64_t n) {
      T* mean = buffers.x;
      average(b, segment_of(b, p), {shift, copies, stride}, i, n, mean);
      if (!shared) return gradient.put(mean, i, n);
      if (has_momentum(b.feedback)) {
        const T* h = load(b.shared, b.state_type, i, n, buffers.a);
        for (int64_t j = 0; j < n; ++j) mean[j] = keep * h[j] + eta * mean[j];
      }
      store(mean, b.shared, b.state_type, i, n);
    });
  });
}

// --- any
// --------------------------------------------------------------------------------------------

inline void publish(const Bucket& b, const Piece& p) {
  const Range range = range_of(b, p);
  if (b.outcome[p.segment] == Outcome::kNonFinite)
    return fill_nan(b.gradient, b.gradient_type, range);
  if (b.outcome[p.segment] == Outcome::kUnused)
    return fill_zero(b.gradient, b.gradient_type, range);
  with_work_type(b, [&]<class T>(T) {
    const GradientWriter gradient(b);
    alignas(64) T buffer[kChunk];
    for_chunks(range, [&](int64_t i, int64_t n) {
      const T* h = load(b.shared, b.state_type, i, n, buffer);
      if (b.loss_scale != nullptr) {
        if (h != buffer) std::copy_n(h, n, buffer);
        scale_up(b, buffer, n);
        h = buffer;
      }
      gradient.put(h, i, n);
    });
  });
}

inline void copy_gradient(const Bucket& b, Range range, void* to) {
  with_work_type(b, [&]<class T>(T) {
    alignas(64) T buffer[kChunk];
    for_chunks(range, [&](int64_t i, int64_t n) {
      T* g = load(b.gradient, b.gradient_type, i, n, buffer);
      store(unscaled(b, g, n, buffer), to, b.state_type, i, n);
    });
  });
}

inline void remember(const Bucket& b, const Piece& p) {
  const Range range = range_of(b, p);
  if (!has_momentum(b.feedback)) return copy_gradient(b, range, b.own_a);
  fill_zero(b.own_a, b.state_type, range);
  copy_gradient(b, range, b.own_b);
}

inline void divide(const Bucket& b, const Piece& p) {
  with_work_type(b, [&]<class T>(T) {
    const T one_over_n = static_cast<T>(1.0 / b.world_size);
    alignas(64) T buffer[kChunk];
    for_chunks(range_of(b, p), [&](int64_t i, int64_t n) {
      T* g = load(b.gradient, b.gradient_type, i, n, buffer);
      for (int64_t j = 0; j < n; ++j) g[j] *= one_over_n;
      store(g, b.gradient, b.gradient_type, i, n);
    });
  });
}

inline void adopt(const Bucket& b, const Piece& p) { copy_gradient(b, range_of(b, p), b.shared); }

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
