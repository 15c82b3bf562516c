// What came back from the wire, into the shared estimate and DDP's bucket. The host does not know
// what became of a tensor, so the result is made here in any case: h or C, or NaN.
#pragma once

#include "kernels/cuda/estimate.h"
#include "kernels/cuda/pack.h"

namespace arc_topk::cuda {

// Where the mean of a dense tensor comes from.
enum class DenseSource : uint8_t {
  kPayload,   // its place in the summed payload
  kMessages,  // its places in the messages of all ranks
  kGradient,  // the gradient is the mean already
};

// The mean of dense tensors, in the work type. At the gradient's scale, but for h at h's.
template <class T>
struct DenseMean {
  DenseSource source;
  Gathered gathered;
  T scale;   // what is summed here is multiplied with, see scale_of_sum()
  T factor;  // what a sum is multiplied with

  DenseMean(const Bucket& b, DenseSource its_source, const Gathered* messages)
      : source(its_source),
        gathered(messages != nullptr ? *messages : Gathered{}),
        scale(static_cast<T>(messages != nullptr ? scale_of_sum(b.world_size) : 1.0)),
        factor(static_cast<T>(1.0 / b.wire_scale / b.world_size) / scale) {}

  template <int kVector>
  ARC_TOPK_DEVICE void load(const Bucket& b, const Segment& s, Run run, T (&x)[kVector]) const {
    if (source == DenseSource::kGradient) {
      Array<AnyType>(b.gradient, b.gradient_type).load(run, x);
    } else {
      load_payload(b, s, run, x);
    }
    if (shares_estimate(b.feedback)) multiply(x, LossScale<T>(b).down);
  }

 private:
  template <int kVector>
  ARC_TOPK_DEVICE void load_payload(const Bucket& b, const Segment& s, Run run,
                                    T (&x)[kVector]) const {
    const DType type = s.dense_in_first ? kTypeOf<T> : b.wire_type;
    void* payload = s.dense_in_first ? b.first : b.second;
    const Run there = run.moved(s.packed - s.offset);
    if (source == DenseSource::kPayload) {
      Array<AnyType>(payload, type).load(there, x);
    } else {
      sum(b, payload, type, there, x);
    }
    multiply(x, factor);
  }

  template <int kVector>
  ARC_TOPK_DEVICE void sum(const Bucket& b, const void* own, DType type, Run run,
                           T (&x)[kVector]) const {
    const int64_t shift =
        static_cast<const char*>(gathered.data) - static_cast<const char*>(gathered.own);
    ARC_TOPK_UNROLL
    for (int j = 0; j < kVector; ++j) x[j] = T(0);
    for (int64_t rank = 0; rank < b.world_size; ++rank) {
      const void* theirs = byte_offset(own, shift + rank * gathered.stride);
      with_type(type, [&]<class S>(S) {
        ARC_TOPK_UNROLL
        for (int j = 0; j < kVector; ++j) {
          if (run.has(j))
            x[j] = x[j] + widen_to<T>(read_unaligned<S>(theirs, run.index + j)) * scale;
        }
      });
    }
  }
};

// Outcomes of dense tensors, before h is touched: unused where the mean is zero everywhere.
template <class T>
struct MarkDense {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = kVectorOf<T>;
  struct Shared {
    bool last;
  };

  Bucket b;
  DenseMean<T> mean;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Scratch scratch(b);
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    block.each([&](int t) {
      if (t == 0 && is_first(p)) give_back(b, p.segment);
    });
    if (!s.compressed()) {
      const Range range = range_of(s, p);
      for_runs<kVector>(block, range.begin, range.end, [&](Run run) {
        T x[kVector];
        mean.load(b, s, run, x);
        for (int j = 0; j < kVector; ++j) {
          if (!run.has(j)) continue;
          if (key_of(x[j]) != 0) block.mark(scratch.used + p.segment, 1u);
          if (!is_finite(x[j])) block.mark(scratch.bad + p.segment, 1u);
        }
      });
    }
    if (!is_last(block, scratch.counters, 1, static_cast<uint32_t>(block.blocks()), shared.last))
      return;
    block.each([&](int t) {
      for (int64_t i = t; i < b.num_segments; i += kThreads) {
        if (b.segments[i].compressed()) continue;
        b.outcome[i] = block.fresh(scratch.bad + i) != 0 ? Outcome::kNonFinite
                       : !b.may_be_unused || block.fresh(scratch.used + i) != 0 ? Outcome::kNormal
                                                                                : Outcome::kUnused;
        scratch.used[i] = 0;
        scratch.bad[i] = 0;
      }
    });
  }
};

template <class T>
struct Apply {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = kVectorOf<T>;
  using Squares = Sums<double, 1>;
  struct Shared {
    int16_t place[kGrain];  // of each row of the piece among its picked ones, or -1
    Squares warps[kWarp];
  };

  Bucket b;
  DenseMean<T> mean;
  Levels<T> levels;
  T eta;
  T keep;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    const Range range = range_of(s, p);
    const Outcome outcome = b.outcome[p.segment];
    if (outcome == Outcome::kNonFinite && (s.compressed() || shares_estimate(b.feedback))) {
      apply_nan(block, p, range);
    } else if (!s.compressed()) {
      apply_dense(block, s, range, outcome);
    } else if (outcome == Outcome::kUnused) {
      apply_nothing(block, range);
    } else if (b.factors.num_tiles > 0) {
      return;  // low rank: Combine has it
    } else if (hands_out_estimate(b)) {
      add_rows(block, shared, s, p);
    } else {
      apply_rows(block, shared, s, p, range);
    }
  }

 private:
  // At the gradient's scale.
  ARC_TOPK_DEVICE void publish_scaled(Run run, const T (&x)[kVector]) const {
    if (!hands_out_estimate(b)) Array<AnyType>(b.gradient, b.gradient_type).store(run, x);
  }
  ARC_TOPK_DEVICE void publish(Run run, T (&x)[kVector]) const {
    multiply(x, LossScale<T>(b).up);
    publish_scaled(run, x);
  }
  // As it is once stored, so that the result is h to the bit.
  ARC_TOPK_DEVICE void store_estimate(Run run, T (&h)[kVector]) const {
    const Array<AnyType> shared(b.shared, b.state_type);
    shared.store(run, h);
    ARC_TOPK_UNROLL
    for (int j = 0; j < kVector; ++j) h[j] = shared.rounded(h[j]);
  }

  template <class Block>
  ARC_TOPK_DEVICE void apply_nan(Block& block, const Piece& p, Range range) const {
    if (hands_out_estimate(b)) {
      block.each([&](int t) {
        if (t == 0 && is_first(p)) withhold(b, p.segment);
      });
      return;
    }
    for_runs<kVector>(block, range.begin, range.end, [&](Run run) {
      T x[kVector];
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) x[j] = static_cast<T>(numbers::float_of(0x7FC00000u));
      publish(run, x);
    });
  }

  template <class Block>
  ARC_TOPK_DEVICE void apply_dense(Block& block, const Segment& s, Range range,
                                   Outcome outcome) const {
    for_runs<kVector>(block, range.begin, range.end, [&](Run run) {
      T x[kVector];
      if (!shares_estimate(b.feedback)) {
        mean.load(b, s, run, x);
        return publish_scaled(run, x);
      }
      // The momentum of a tensor that nobody used stays; without momentum h is the mean, zero or
      // not.
      const bool blends = has_momentum(b.feedback);
      T h[kVector] = {};
      if (blends && outcome == Outcome::kUnused) return publish(run, h);
      if (blends) Array<AnyType>(b.shared, b.state_type).load(run, h);
      mean.load(b, s, run, x);
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) h[j] = blends ? keep * h[j] + eta * x[j] : x[j];
      store_estimate(run, h);
      publish(run, h);
    });
  }

  template <class Block>
  ARC_TOPK_DEVICE void apply_nothing(Block& block, Range range) const {
    for_runs<kVector>(block, range.begin, range.end, [&](Run run) {
      T nothing[kVector] = {};
      publish(run, nothing);
    });
  }

  // h += C, where h is the result: nothing but the picked rows is touched.
  template <class Block>
  ARC_TOPK_DEVICE void add_rows(Block& block, Shared& shared, const Segment& s,
                                const Piece& p) const {
    const PickRange range = picks_of(block, b, s, p);
    if (range.first == range.last) return;
    const Array<AnyType> estimate(b.shared, b.state_type);
    typename Block::template Each<Squares> squares;
    block.each([&](int t) { squares[t] = {}; });
    for_picked<kVector>(block, b, s, p, range, [&](int t, Run run, Run from, int64_t row) {
      T h[kVector];
      T c[kVector];
      estimate.load(run, h);
      load_mean(s, row, from, c);
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) {
        h[j] = h[j] + c[j];
        if (run.has(j))
          squares[t].value[0] += static_cast<double>(c[j]) * static_cast<double>(c[j]);
      }
      estimate.store(run, h);
    });
    add_sum(block, squares, shared.warps, &b.energy->captured);
  }

  // The whole piece into the gradient: C, or h + C in another type than h's.
  template <class Block>
  ARC_TOPK_DEVICE void apply_rows(Block& block, Shared& shared, const Segment& s, const Piece& p,
                                  Range range) const {
    const int64_t first_pick = find_places(block, shared, s, p);
    typename Block::template Each<Squares> squares;
    const auto cols = static_cast<uint32_t>(s.cols);
    const int64_t origin = s.offset + p.row_begin * s.cols;
    const int64_t runs = runs_of<kVector>(range.begin, range.end);
    block.each([&](int t) {
      squares[t] = {};
      for (int64_t i = t; i < runs; i += kThreads) {
        const Run run = run_of<kVector>(range.begin, range.end, i);
        T h[kVector] = {};
        const bool has_h = shares_estimate(b.feedback);
        if (has_h) Array<AnyType>(b.shared, b.state_type).load(run, h);
        bool changed = false;
        auto local = static_cast<uint32_t>(run.index + run.first - origin);
        uint32_t row = local / cols, col = local % cols;
        ARC_TOPK_UNROLL
        for (int j = 0; j < kVector; ++j) {
          if (!run.has(j)) continue;
          if (const int k = shared.place[row]; k >= 0) {
            T c[1];
            load_mean(s, p.row_begin + row, Run{s.packed + (first_pick + k) * s.cols + col, 0, 1},
                      c);
            h[j] = has_h ? h[j] + c[0] : c[0];
            changed = true;
            squares[t].value[0] += static_cast<double>(c[0]) * static_cast<double>(c[0]);
          }
          if (++col == cols) {
            col = 0;
            ++row;
          }
        }
        if (has_h && changed) store_estimate(run, h);
        publish(run, h);
      }
    });
    add_sum(block, squares, shared.warps, &b.energy->captured);
  }

  // Fills shared.place[]; returns the pick that its numbers count from.
  template <class Block>
  ARC_TOPK_DEVICE int64_t find_places(Block& block, Shared& shared, const Segment& s,
                                      const Piece& p) const {
    const int32_t* picks = b.picks + s.pick;
    const PickRange range = picks_of(block, b, s, p);
    block.each([&](int t) {
      for (int64_t row = t; row < p.row_end - p.row_begin; row += kThreads) shared.place[row] = -1;
    });
    block.sync();
    block.each([&](int t) {
      for (int64_t k = range.first + t; k < range.last; k += kThreads)
        shared.place[picks[k] - p.row_begin] = static_cast<int16_t>(k - range.first);
    });
    block.sync();
    return range.first;
  }

  // C of a run of a row, which lies at `from` in the payload.
  template <int kCount>
  ARC_TOPK_DEVICE void load_mean(const Segment& s, int64_t row, Run from, T (&c)[kCount]) const {
    if (levels.used) return mean_of_levels(b, s, levels, row, from, c);
    Array<AnyType>(b.second, b.wire_type).load(from, c);
    multiply(c, mean.factor);
  }
};

// Top-K: the mean of all ranks' sparse messages, a stretch of elements at a time in shared memory.
// Ranks one after the other, each of whose elements differ: the same sums in every run.
template <class T>
struct ApplyGathered {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = kVectorOf<T>;
  static constexpr int64_t kStretch = 8192 / sizeof(T);
  using Squares = Sums<double, 1>;
  struct Shared {
    typename Apply<T>::Shared rest;
    T sum[kStretch];
  };

  Apply<T> apply;  // of dense tensors and of those in which nothing arrived

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Bucket& b = apply.b;
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    if (!s.compressed() || b.outcome[p.segment] != Outcome::kNormal)
      return apply(block, shared.rest);
    typename Block::template Each<Squares> squares;
    block.each([&](int t) { squares[t] = {}; });
    const Range range = range_of(s, p);
    for (int64_t begin = range.begin; begin < range.end; begin += kStretch) {
      const int64_t end = smaller(begin + kStretch, range.end);
      add_up(block, shared, s, begin, end);
      block.each([&](int t) {
        for (int64_t i = begin + t; i < end; i += kThreads)
          squares[t].value[0] += put(shared.sum[i - begin], i);
      });
      // No barrier: the same thread sets an element's sum back to zero.
    }
    add_sum(block, squares, shared.rest.warps, &b.energy->captured);
  }

 private:
  template <class Block>
  ARC_TOPK_DEVICE void add_up(Block& block, Shared& shared, const Segment& s, int64_t begin,
                              int64_t end) const {
    const Bucket& b = apply.b;
    const Gathered& gathered = apply.mean.gathered;
    const int64_t shift =
        static_cast<const char*>(gathered.data) - static_cast<const char*>(gathered.own);
    block.each([&](int t) {
      for (int64_t i = t; i < end - begin; i += kThreads) shared.sum[i] = T(0);
    });
    // count_below() has the barrier.
    for (int64_t rank = 0; rank < b.world_size; ++rank) {
      const int64_t there = shift + rank * gathered.stride;
      const void* picks = byte_offset(static_cast<const void*>(b.picks + s.pick), there);
      const void* values = byte_offset(static_cast<const void*>(b.second), there);
      const auto pick = [&](int64_t k) { return read_unaligned<int32_t>(picks, k); };
      const int64_t first = count_below(block, s.kept, begin - s.offset, pick);
      const int64_t last = count_below(block, s.kept, end - s.offset, pick);
      with_type(b.wire_type, [&]<class W>(W) {
        block.each([&](int t) {
          for (int64_t k = first + t; k < last; k += kThreads) {
            T& sum = shared.sum[s.offset + pick(k) - begin];
            sum = sum + widen_to<T>(read_unaligned<W>(values, s.packed + k)) * apply.mean.scale;
          }
        });
      });
      block.sync();
    }
  }

  // One element's mean where it belongs; returns its square.
  ARC_TOPK_DEVICE double put(T sum, int64_t i) const {
    const Bucket& b = apply.b;
    const Run run{i, 0, 1};
    T c[1] = {sum * apply.mean.factor};
    const double square = static_cast<double>(c[0]) * static_cast<double>(c[0]);
    if (hands_out_estimate(b) && sum == 0) return square;  // h stays
    if (shares_estimate(b.feedback)) {
      const Array<AnyType> shared(b.shared, b.state_type);
      T h[1];
      shared.load(run, h);
      h[0] = h[0] + c[0];
      shared.store(run, h);
      c[0] = shared.rounded(h[0]);
    }
    multiply(c, LossScale<T>(b).up);
    if (!hands_out_estimate(b)) Array<AnyType>(b.gradient, b.gradient_type).store(run, c);
    return square;
  }
};

}  // namespace arc_topk::cuda
