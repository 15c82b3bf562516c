// What reads the whole gradient before the first collective: the state's update with the sketch on
// the way, and the keys that rows are selected by.
#pragma once

#include <algorithm>

#include "base/random.h"
#include "kernels/cpu/fused.h"
#include "kernels/levels.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

inline const Segment& segment_of(const Bucket& b, const Piece& p) { return b.segments[p.segment]; }
inline bool used_here(const Bucket& b, const Piece& p) { return b.used[p.segment]; }

// Elements [begin, end) of the bucket that a piece covers.
struct Range {
  int64_t begin;
  int64_t end;
};
inline Range range_of(const Bucket& b, const Piece& p) {
  const Segment& s = segment_of(b, p);
  return {s.offset + p.row_begin * s.cols, s.offset + std::min(p.row_end * s.cols, s.numel)};
}

// Calls f(begin, n) for the chunks of a range.
template <class F>
inline void for_chunks(Range range, F&& f) {
  for (int64_t i = range.begin; i < range.end; i += kChunk) f(i, std::min(kChunk, range.end - i));
}

template <class F, class T>
inline Elements<T> load_elements(const Bucket& b, int64_t i, int64_t n, Buffers<T>& buffers) {
  constexpr int kStates = own_states(F::kKind);
  return {unscaled(b, load(b.gradient, b.gradient_type, i, n, buffers.g), n, buffers.g),
          kStates > 0 ? load(b.own_a, b.state_type, i, n, buffers.a) : nullptr,
          kStates > 1 ? load(b.own_b, b.state_type, i, n, buffers.b) : nullptr};
}

// --- prepare
// --------------------------------------------------------------------------------------

// Forms the message of a chunk and stores it where it is kept. Returns whether all of it was
// finite, and in x where it lies.
template <class F, class T>
inline bool prepare_chunk(const Bucket& b, const F& feedback, int64_t i, int64_t n, bool store_it,
                          Buffers<T>& buffers, const T*& x) {
  const Elements<T> e = load_elements<F>(b, i, n, buffers);
  const bool stores = store_it && keeps_message(F::kKind);
  T* to = stores && b.state_type == kTypeOf<T> ? e.a : buffers.x;
  const bool finite = form(b, feedback, e, n, to);
  if (stores) store(to, b.own_a, b.state_type, i, n);
  x = to;
  return finite;
}

// This rank's shares of the rows' units, where the wire has levels: from each row of the message
// while it lies in a cache.
template <class T>
class OwnShares {
 public:
  OwnShares(const Bucket& b, const Segment& s, const Piece& p)
      : levels_(b), to_(static_cast<T*>(b.first) + s.units(b.sketch_dim) + p.row_begin) {}

  void row(const T* x, int64_t n) {
    part(x, n);
    end(n);
  }
  // A longer row comes in parts.
  void part(const T* x, int64_t n) {
    if (levels_.used) squares_.add(x, n);
  }
  void end(int64_t numel) {
    if (!levels_.used) return;
    *to_++ = levels_.own_share(squares_.value(), numel);
    squares_ = {};
  }
  // Of all rows of a range.
  void rows(const T* x, Range range, int64_t cols) {
    if (!levels_.used) return;
    for (int64_t i = range.begin; i < range.end; i += cols)
      row(x + i, std::min(cols, range.end - i));
  }

 private:
  const Levels<T> levels_;
  T* to_;
  SumOfSquares<T> squares_;
};

template <class F, class T>
inline bool prepare_rows(const Bucket& b, const Piece& p, const F& feedback, const Projection& v,
                         bool store_it) {
  const Segment& s = segment_of(b, p);
  const Range range = range_of(b, p);
  Buffers<T> buffers;
  Sketch<T> sketch(v, b.sketch_dim, s.cols);
  T* sketches = static_cast<T*>(b.first) + s.sketch + p.row_begin * b.sketch_dim;
  OwnShares<T> shares(b, s, p);
  if constexpr (kRegisterBytes == 64) {
    if (is_fused<F, T>(b, s, store_it)) {
      const void* message = keeps_message(F::kKind) ? b.own_a : b.gradient;
      // Rows that still lie in the L1 cache when their units are formed; four at least, for
      // form_and_sketch().
      constexpr int64_t kSome = 4096;
      const int64_t some = sends_levels(b) ? std::max<int64_t>(4, kSome / s.cols) * s.cols
                                           : std::max<int64_t>(1, range.end - range.begin);
      bool finite = true;
      for (int64_t i = range.begin; i < range.end; i += some) {
        const Range rows{i, std::min(i + some, range.end)};
        finite &= form_and_sketch(b, feedback, sketch, s.cols, rows.begin, rows.end,
                                  sketches + (i - range.begin) / s.cols * b.sketch_dim);
        shares.rows(static_cast<const T*>(message), rows, s.cols);
      }
      return finite;
    }
  }
  bool finite = true;
  const T* x = nullptr;

  if (s.cols <= kChunk) {  // some whole rows at a time
    const int64_t numel = kChunk / s.cols * s.cols;
    for (int64_t i = range.begin; i < range.end; i += numel) {
      const int64_t n = std::min(numel, range.end - i);
      finite &= prepare_chunk(b, feedback, i, n, store_it, buffers, x);
      for (int64_t at = 0; at < n; at += s.cols, sketches += b.sketch_dim) {
        sketch.row(x + at, std::min(s.cols, n - at), sketches);
        shares.row(x + at, std::min(s.cols, n - at));
      }
    }
    return finite;
  }
  for (int64_t row = range.begin; row < range.end; row += s.cols, sketches += b.sketch_dim) {
    const int64_t end = std::min(row + s.cols, range.end);
    sketch.begin();
    for_chunks({row, end}, [&](int64_t i, int64_t n) {
      finite &= prepare_chunk(b, feedback, i, n, store_it, buffers, x);
      sketch.part(x, i - row, n);
      shares.part(x, n);
    });
    sketch.end(sketches);
    shares.end(end - row);
  }
  return finite;
}

inline bool prepare(const Bucket& b, const Piece& p, const Projection* v, bool store_it) {
  return with_feedback(b, [&]<class F, class T>(const F& feedback, T) {
    if (v != nullptr) return prepare_rows<F, T>(b, p, feedback, *v, store_it);
    Buffers<T> buffers;
    const T* x = nullptr;
    bool finite = true;
    for_chunks(range_of(b, p), [&](int64_t i, int64_t n) {
      finite &= prepare_chunk(b, feedback, i, n, store_it, buffers, x);
    });
    return finite;
  });
}

// An element whose candidate was not finite was never stored: it would not be finite now either,
// since its gradient is not.
template <class S, class F, class T>
inline void undo_chunk(const F& feedback, const Elements<T>& e, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T candidate = e.a[i];
    T before = e.a[i];
    T b = own_states(F::kKind) > 1 ? e.b[i] : T(0);
    feedback.prepare(e.g[i], candidate, b);
    feedback.undo(e.g[i], before, b);
    e.a[i] = is_finite(widen_to<T>(narrow_to<S>(candidate))) ? before : e.a[i];
  }
}

inline void undo(const Bucket& b, const Piece& p) {
  with_feedback(b, [&]<class F, class T>(const F& feedback, T) {
    if constexpr (keeps_message(F::kKind)) {
      Buffers<T> buffers;
      for_chunks(range_of(b, p), [&](int64_t i, int64_t n) {
        const Elements<T> e = load_elements<F>(b, i, n, buffers);
        with_type(b.state_type, [&]<class S>(S) { undo_chunk<S>(feedback, e, n); });
        store(e.a, b.own_a, b.state_type, i, n);
      });
    }
  });
}

// --- used?
// ----------------------------------------------------------------------------------------

template <class Bits>
inline bool has_nonzero_bits(const Bits* x, int64_t n) {
  Bits any = 0;
  for (int64_t i = 0; i < n; ++i) any |= x[i];
  return static_cast<Bits>(any << 1) != 0;  // but for the sign: -0 is zero
}

inline bool has_nonzero(const Bucket& b, const Piece& p) {
  const Range range = range_of(b, p);
  const auto search = [&]<class Bits>(Bits) {
    for (int64_t i = range.begin; i < range.end; i += kChunk) {
      const Bits* x = static_cast<const Bits*>(b.gradient) + i;
      if (has_nonzero_bits(x, std::min(kChunk, range.end - i))) return true;
    }
    return false;
  };
  switch (size_of(b.gradient_type)) {
    case 8:
      return search(uint64_t{});
    case 4:
      return search(uint32_t{});
    default:
      return search(uint16_t{});
  }
}

// --- keys
// -----------------------------------------------------------------------------------------

inline double score(const Bucket& b, const Piece& p) {
  return with_work_type(b, [&]<class T>(T) {
    const Segment& s = segment_of(b, p);
    const T* sketch = static_cast<const T*>(b.first) + s.sketch;
    auto* keys = static_cast<Key<T>*>(b.scratch) + s.key;
    const T mean = static_cast<T>(1.0 / b.world_size);
    double total = 0;
    for (int64_t row = p.row_begin; row < p.row_end; ++row) {
      T sum = 0;
      for (int64_t k = 0; k < b.sketch_dim; ++k) {
        const T x = sketch[row * b.sketch_dim + k] * mean;
        sum = sum + x * x;
      }
      keys[row] = key_of_score(sum);
      total += static_cast<double>(number_of<T>(keys[row]));
    }
    return total;
  });
}

inline void randomize(const Bucket& b, const Piece& p, uint64_t seed, uint64_t step) {
  with_work_type(b, [&]<class T>(T) {
    const Segment& s = segment_of(b, p);
    auto* keys = static_cast<Key<T>*>(b.scratch) + s.key;
    constexpr int64_t kGroups = kChunk / 4;
    uint32_t word[kGroups][4];
    for (int64_t first = p.row_begin / 4; first * 4 < p.row_end; first += kGroups) {
      for (int64_t i = 0; i < kGroups; ++i) {
        const Philox block = selection_keys(static_cast<uint32_t>(first + i), s.stream, seed, step);
        for (int j = 0; j < 4; ++j) word[i][j] = block.word[j];
      }
      const int64_t begin = std::max<int64_t>(p.row_begin, first * 4);
      const int64_t end = std::min<int64_t>(p.row_end, first * 4 + kChunk);
      for (int64_t row = begin; row < end; ++row) keys[row] = (&word[0][0])[row - first * 4];
    }
  });
}

inline void magnitudes(const Bucket& b, const Piece& p) {
  with_feedback(b, [&]<class F, class T>(const F& feedback, T) {
    const Segment& s = segment_of(b, p);
    auto* keys = static_cast<Key<T>*>(b.scratch) + s.key;
    Buffers<T> buffers;
    for_chunks(range_of(b, p), [&](int64_t i, int64_t n) {
      const Elements<T> e = load_elements<F>(b, i, n, buffers);
      const T* x = message(b, feedback, e, n, used_here(b, p), buffers.x);
      Key<T>* to = keys + (i - s.offset);
      for (int64_t j = 0; j < n; ++j) to[j] = key_of(x[j]);
    });
  });
}

// --- V
// --------------------------------------------------------------------------------------------

inline void project(float* data, int64_t stride, int64_t begin, int64_t end, int64_t sketch_dim,
                    uint64_t seed, uint64_t step) {
  float z[4][kChunk];
  for (int64_t group = 0; group * 4 < sketch_dim; ++group) {
    for_chunks({begin, end}, [&](int64_t row, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const Normals four = projection_normals(static_cast<uint32_t>(row + i),
                                                static_cast<uint32_t>(group), seed, step);
        for (int j = 0; j < 4; ++j) z[j][i] = four.z[j];
      }
      for (int64_t j = 0; j < std::min<int64_t>(4, sketch_dim - group * 4); ++j) {
        std::copy_n(z[j], n, data + (group * 4 + j) * stride + row);
      }
    });
  }
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
