// What low rank does to one piece, tile or segment: low_rank.h lists it. Between steps the residual
// is own_a - P^ R_i^T; here it is formed, and left so.
#pragma once

#include "kernels/cpu/apply.h"
#include "kernels/cpu/directions.h"
#include "kernels/cpu/low_rank.h"
#include "kernels/cpu/products.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

template <class T>
struct Blocks {
  using Block = T[kTallRows][kBlockCols];
  alignas(64) Block x;
  alignas(64) Block c;
  alignas(64) T g[kBlockCols];
};

// Some rows of a matrix, some columns of each.
struct Window {
  int64_t at;  // of the first row's first element in the bucket
  int64_t row;
  int64_t rows;
  int64_t col;
  int64_t cols;
  int64_t stride;
  int64_t end;  // of the tensor, which may cut its last row short

  int64_t start(int64_t i) const { return at + i * stride; }
  int64_t valid(int64_t i) const { return std::clamp<int64_t>(end - start(i), 0, cols); }
};

// Calls f(window) for what is between these rows and columns, at most `rows` rows at a time.
template <class F>
inline void for_windows(const Segment& s, const Piece& p, int64_t rows, const F& f) {
  for (int64_t row = p.row_begin; row < p.row_end; row += rows) {
    for (int64_t col = p.col_begin; col < p.col_end; col += kBlockCols) {
      f(Window{s.offset + row * s.cols + col, row, std::min<int64_t>(rows, p.row_end - row), col,
               std::min<int64_t>(kBlockCols, p.col_end - col), s.cols, s.offset + s.numel});
    }
  }
}

// --- between steps: W, R_i
// ------------------------------------------------------------------------

template <class X>
inline bool is_zero(const X* x, int64_t n) {
  return std::all_of(x, x + n, [](X one) { return one == 0; });
}

inline void draw(const Bucket& b, const Segment& s, uint64_t seed, uint64_t step) {
  for (int64_t c = 0; c < s.kept; ++c) {
    float* w = basis_of(b, s) + c * factor_stride(s.cols);
    if (is_zero(w, s.cols)) draw_column(w, s.cols, c, s.stream, seed, step);
  }
}

inline bool pending(const Bucket& b, const Segment& s) {
  return with_work_type(b, [&]<class T>(T) {
    for (int64_t c = 0; c < s.kept; ++c) {
      if (!is_zero(right_of<T>(b, s) + c * factor_stride(s.cols), s.cols)) return true;
    }
    return false;
  });
}

inline void forget(const Bucket& b, const Segment& s) {
  if (!remembers(b)) return;
  with_work_type(
      b, [&]<class T>(T) { std::fill_n(right_of<T>(b, s), s.kept * factor_stride(s.cols), T(0)); });
}

// --- the residual and the message
// -----------------------------------------------------------------

// e = old - c, rounded as if it was stored; where that is not finite nothing was sent.
template <class S, class T>
[[gnu::always_inline]] inline T residual(T old, T c) {
  const T e = widen_to<T>(narrow_to<S>(old - c));
  return is_finite(e) ? e : old;
}

// x[] = g[] + e[]; where that is not finite it is left out. Returns whether all was.
template <class S, class T>
inline bool form_message(const T* g, const T* old, const T* c, int64_t n, T* x) {
  int nonfinite = 0;
#pragma GCC ivdep  // x is `old`, or overlaps none of them
  for (int64_t i = 0; i < n; ++i) {
    const T e = residual<S>(old[i], c[i]);
    const T message = widen_to<T>(narrow_to<S>(e + g[i]));
    const bool finite = is_finite(message);
    nonfinite |= !finite;
    x[i] = finite ? message : e;
  }
  return nonfinite == 0;
}

template <class T>
inline bool all_finite(const T* x, int64_t n) {
  int nonfinite = 0;
  for (int64_t i = 0; i < n; ++i) nonfinite |= !is_finite(x[i]);
  return nonfinite == 0;
}

// n elements of the bucket, and zeros up to `cols`, as T: where they lie if that is possible.
template <class T>
inline const T* padded(const T* x, int64_t n, int64_t cols, T* buffer) {
  if (n == cols) return x;
  if (x != buffer) std::copy_n(x, n, buffer);
  std::fill(buffer + n, buffer + cols, T(0));
  return buffer;
}

template <class T>
inline bool prepare_window(const Bucket& b, const Segment& s, const Window& w, bool store_it,
                           Blocks<T>& blocks) {
  const int64_t k = s.kept;
  const int64_t stride = factor_stride(s.cols);
  const T* x[kBlockRows];
  T* c[kBlockRows];
  for (int i = 0; i < kBlockRows; ++i) c[i] = blocks.c[i];
  if (remembers(b)) {
    ReadNext<T> next;
    if (b.gradient_type == kTypeOf<T> && b.state_type == kTypeOf<T>)
      next = {static_cast<T*>(b.gradient) + w.at, static_cast<T*>(b.own_a) + w.at, s.cols};
    combine(left_of<T>(b, s) + w.row * k, k, right_of<T>(b, s) + w.col, stride, w.rows, w.cols, c,
            next);
  }
  bool finite = true;
  for (int64_t i = 0; i < w.rows; ++i) {
    const int64_t at = w.start(i);
    const int64_t n = w.valid(i);
    T* buffer = blocks.x[i];
    const T* g = unscaled(b, load(b.gradient, b.gradient_type, at, n, blocks.g), n, blocks.g);
    if (remembers(b)) {
      T* old = load(b.own_a, b.state_type, at, n, buffer);
      T* to = store_it ? old : buffer;
      with_type(b.state_type, [&]<class S>(S) { finite &= form_message<S>(g, old, c[i], n, to); });
      if (store_it) store(to, b.own_a, b.state_type, at, n);
      x[i] = padded<T>(to, n, w.cols, buffer);
    } else {
      finite &= all_finite(g, n);
      if (g == blocks.g) {  // which the next row needs
        std::copy_n(g, n, buffer);
        g = buffer;
      }
      x[i] = padded<T>(g, n, w.cols, buffer);
    }
  }
  T* p = static_cast<T*>(b.first) + s.sketch + w.row * k;
  for (int64_t col = 0; col < w.cols; col += kWindowCols) {
    const int64_t n = std::min(kWindowCols, w.cols - col);
    project_rows(x, w.rows, n, basis_of(b, s) + w.col + col, stride, w.col + col == 0, k, p);
    for (int64_t i = 0; i < w.rows; ++i) x[i] += n;
  }
  return finite;
}

inline bool prepare_message(const Bucket& b, const Piece& p, bool store_it) {
  return with_work_type(b, [&]<class T>(T) {
    const Segment& s = segment_of(b, p);
    Blocks<T> blocks;
    bool finite = true;
    for_windows(s, p, kBlockRows,
                [&](const Window& w) { finite &= prepare_window(b, s, w, store_it, blocks); });
    return finite;
  });
}

inline void settle(const Bucket& b, const Piece& p) {
  if (!remembers(b)) return;
  with_work_type(b, [&]<class T>(T) {
    const Segment& s = segment_of(b, p);
    Blocks<T> blocks;
    T* c[kBlockRows];
    for (int i = 0; i < kBlockRows; ++i) c[i] = blocks.c[i];
    for_windows(s, p, kBlockRows, [&](const Window& w) {
      combine(left_of<T>(b, s) + w.row * s.kept, s.kept, right_of<T>(b, s) + w.col,
              factor_stride(s.cols), w.rows, w.cols, c);
      for (int64_t i = 0; i < w.rows; ++i) {
        const int64_t n = w.valid(i);
        T* e = load(b.own_a, b.state_type, w.start(i), n, blocks.x[i]);
        with_type(b.state_type, [&]<class S>(S) {
#pragma GCC ivdep
          for (int64_t j = 0; j < n; ++j) e[j] = residual<S>(e[j], c[i][j]);
        });
        store(e, b.own_a, b.state_type, w.start(i), n);
      }
    });
  });
}

// --- P^ and R
// -------------------------------------------------------------------------------------

inline void orthonormalise(const Bucket& b, const Segment& s) {
  with_work_type(b, [&]<class T>(T) {
    if (sends_directions(b)) receive_directions<T>(b, s);
    orthonormalise(static_cast<const T*>(b.first) + s.sketch, s.rows, s.kept,
                   static_cast<double*>(b.scratch) + place_of(b, s).left, left_of<T>(b, s));
  });
}

inline void multiply_back(const Bucket& b, const Piece& tile) {
  with_work_type(b, [&]<class T>(T) {
    const Segment& s = segment_of(b, tile);
    const int64_t stride = factor_stride(s.cols);
    T* sums = partial_of<T>(b, s, tile.row_begin / kStripRows) + tile.col_begin;
    for (int64_t c = 0; c < s.kept; ++c)
      std::fill_n(sums + c * stride, tile.col_end - tile.col_begin, T(0));
    Blocks<T> blocks;
    const T* x[kTallRows];
    const int64_t size = size_of(remembers(b) ? b.state_type : b.gradient_type);
    // Another type is converted first, and then lies in a buffer.
    const int64_t ahead = size == sizeof(T) ? kTallRows * s.cols * size : 0;
    for_windows(s, tile, kTallRows, [&](const Window& w) {
      for (int64_t i = 0; i < w.rows; ++i) {
        const int64_t n = w.valid(i);
        T* buffer = blocks.x[i];
        const T* message =
            remembers(b)
                ? load(b.own_a, b.state_type, w.start(i), n, buffer)
                : unscaled(b, load(b.gradient, b.gradient_type, w.start(i), n, buffer), n, buffer);
        x[i] = padded<T>(message, n, w.cols, buffer);
      }
      gather_rows(x, w.rows, w.cols, left_of<T>(b, s) + w.row * s.kept, s.kept,
                  sums + (w.col - tile.col_begin), stride, ahead);
    });
  });
}

// Column after column, chunk after chunk: calls f(c, j, n).
template <class F>
inline void for_columns(const Segment& s, const F& f) {
  for (int64_t c = 0; c < s.kept; ++c) {
    for (int64_t j = 0; j < s.cols; j += kChunk) f(c, j, std::min(kChunk, s.cols - j));
  }
}

// --- R
// --------------------------------------------------------------------------------------------

// What arrives of n elements x[] of R_i's column c, from row j on; puts them on the wire.
template <class T>
inline const T* round_column(const Bucket& b, const Segment& s, int64_t c, int64_t j, int64_t n,
                             const T* x, T* rounded) {
  const int64_t at = s.packed + c * s.cols + j;
  if (!sends_levels(b)) return round_to_wire(b, x, n, b.second, at, rounded);
  const Levels<T> levels(b);
  auto* bytes = static_cast<uint8_t*>(b.second) + at;
  round_to_levels(levels, units_of<T>(b, s)[c], x, n, bytes, rounded);
  return rounded;
}

inline void send(const Bucket& b, const Segment& s, bool normal) {
  if (!normal) {
    const int64_t size = size_of(b.wire_type);
    const int zero = sends_levels(b) ? most_level(b.world_size) : 0;
    std::memset(byte_offset(b.second, s.packed * size), zero,
                static_cast<size_t>(s.kept * s.cols * size));
    return;
  }
  with_work_type(b, [&]<class T>(T) {
    const int64_t stride = factor_stride(s.cols);
    const int64_t strips = (s.rows + kStripRows - 1) / kStripRows;
    alignas(64) T sum[kChunk];
    alignas(64) T rounded[kChunk];
    for_columns(s, [&](int64_t c, int64_t j, int64_t n) {
      std::copy_n(partial_of<T>(b, s, 0) + c * stride + j, n, sum);
      for (int64_t strip = 1; strip < strips; ++strip) {
        const T* part = partial_of<T>(b, s, strip) + c * stride + j;
        for (int64_t i = 0; i < n; ++i) sum[i] += part[i];
      }
      for (int64_t i = 0; i < n; ++i) sum[i] = is_finite(sum[i]) ? sum[i] : T(0);
      const T* sent = round_column(b, s, c, j, n, sum, rounded);
      if (remembers(b)) std::copy_n(sent, n, right_of<T>(b, s) + c * stride + j);
    });
  });
}

inline void receive(const Bucket& b, const Segment& s) {
  with_work_type(b, [&]<class T>(T) {
    const int64_t stride = factor_stride(s.cols);
    const T factor = mean_factor<T>(b);
    const Levels<T> levels(b);
    T* r = partial_of<T>(b, s, 0);
    alignas(64) T buffer[kChunk];
    for_columns(s, [&](int64_t c, int64_t j, int64_t n) {
      const int64_t at = s.packed + c * s.cols + j;
      T* to = r + c * stride + j;
      if (sends_levels(b)) {
        const auto* sums = static_cast<const uint8_t*>(b.second) + at;
        return mean_of_bytes(levels, units_of<T>(b, s)[c], sums, n, to);
      }
      const T* sum = load(b.second, b.wire_type, at, n, buffer);
      for (int64_t i = 0; i < n; ++i) to[i] = sum[i] * factor;
    });
    for (int64_t c = 0; c < s.kept; ++c)
      unit_column(r + c * stride, s.cols, basis_of(b, s) + c * stride);
  });
}

inline void reclaim_factor(const Bucket& b, const Segment& s) {
  with_work_type(b, [&]<class T>(T) {
    const int64_t stride = factor_stride(s.cols);
    const T* mean = partial_of<T>(b, s, 0);
    T* sent = right_of<T>(b, s);
    for_columns(s, [&](int64_t c, int64_t j, int64_t n) {
      for (int64_t i = c * stride + j; i < c * stride + j + n; ++i) {
        const T left = sent[i] - mean[i];
        sent[i] = is_finite(left) ? left : sent[i];
      }
    });
  });
}

// --- C
// --------------------------------------------------------------------------------------------

inline void apply_factors(const Bucket& b, const Piece& p, Outcome outcome) {
  if (outcome != Outcome::kNormal) return fill_empty(b, outcome, range_of(b, p));
  with_work_type(b, [&]<class T>(T) {
    const Segment& s = segment_of(b, p);
    const GradientWriter gradient(b);
    const bool is_result = b.gradient_type == kTypeOf<T> && b.loss_scale == nullptr;
    Blocks<T> blocks;
    T* c[kBlockRows];
    for_windows(s, p, kBlockRows, [&](const Window& w) {
      const bool whole = w.valid(w.rows - 1) == w.cols;
      const bool in_place =
          is_result && whole &&
          (!gradient.past_caches() || (gradient.takes_registers(w.at, w.stride, kRegisterBytes) &&
                                       w.cols % kRegisterWidth<T> == 0));
      for (int64_t i = 0; i < w.rows; ++i)
        c[i] = in_place ? static_cast<T*>(b.gradient) + w.start(i) : blocks.c[i];
      const T* left = left_of<T>(b, s) + w.row * s.kept;
      const T* right = partial_of<T>(b, s, 0) + w.col;
      const int64_t stride = factor_stride(s.cols);
      if (in_place && gradient.past_caches()) {
        combine<Put::kPastCaches>(left, s.kept, right, stride, w.rows, w.cols, c);
      } else {
        combine(left, s.kept, right, stride, w.rows, w.cols, c);
      }
      if (in_place) return;
      for (int64_t i = 0; i < w.rows; ++i) {
        const int64_t n = w.valid(i);
        scale_up(b, c[i], n);
        gradient.put(c[i], w.start(i), n);
      }
    });
  });
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
