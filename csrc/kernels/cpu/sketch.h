// The sketch of one row: P_j = X_j V / sqrt(r), r dot products of the same row.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/cpu/lanes.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// A row of X where it lies in memory. Sketch takes the lanes of a row from any such source; what a
// source finds in them it adds to `found`, which is here nothing.
template <class T>
struct StoredRow {
  struct Found {};
  const T* x;

  [[gnu::always_inline]] Lanes<T> lanes(int64_t c, Found&) const { return load_lanes<T>(x + c); }
  // n < kWidth of them, zeros behind.
  [[gnu::always_inline]] Lanes<T> last_lanes(int64_t c, int64_t n, Found&) const {
    return load_some_lanes<T>(x + c, n);
  }
  // Where the row lies once it has been gone through.
  StoredRow again() const { return *this; }
};

template <class T>
class Sketch {
 public:
  Sketch(const Projection& v, int64_t dim, int64_t cols)
      : v_(v),
        dim_(dim),
        tail_at_(cols / kWidth * kWidth),
        scale_(static_cast<T>(1 / std::sqrt(dim))) {
    for (int64_t k = 0; k < dim; ++k) {
      for (int64_t c = 0; c < kWidth; ++c) {
        tail_[k][c] = tail_at_ + c < cols ? v.data[k * v.stride + tail_at_ + c] : 0.0f;
      }
    }
  }

  // A row of n elements that lie together.
  void row(const T* x, int64_t n, T* p) const {
    const StoredRow<T> source{x};
    typename StoredRow<T>::Found nothing;
    rows<1>(&source, n, p, nothing);
  }

  // kRows rows of n elements, V being loaded once for all of them.
  template <int kRows, class Source>
  [[gnu::always_inline]] void rows(const Source* x, int64_t n, T* p,
                                   typename Source::Found& found) const {
    for_blocks([&]<int R>(int64_t k) __attribute__((always_inline)) {
      Lanes<T> sum[kRows * R] = {};
      if (k == 0) {
        add<R, kRows>(x, 0, n, k, sum, found);
      } else {
        for (int j = 0; j < kRows; ++j) add_again<R>(x[j].again(), n, k, sum + j * R);
      }
      for (int j = 0; j < kRows; ++j) write<R>(sum + j * R, p + j * dim_ + k);
    });
  }

  // A longer row comes in parts: begin(), part() for each, end(). Parts begin at multiples of
  // kWidth.
  void begin() { std::fill_n(sums_, dim_, Lanes<T>{}); }
  void part(const T* x, int64_t column, int64_t n) {
    const StoredRow<T> source{x};
    typename StoredRow<T>::Found nothing;
    for_blocks([&]<int R>(int64_t k) {
      Lanes<T> sum[R];
      for (int i = 0; i < R; ++i) sum[i] = sums_[k + i];
      add<R, 1>(&source, column, n, k, sum, nothing);
      for (int i = 0; i < R; ++i) sums_[k + i] = sum[i];
    });
  }
  void end(T* p) const {
    for (int64_t k = 0; k < dim_; ++k) p[k] = sum_lanes(sums_[k]) * scale_;
  }

 private:
  static constexpr int64_t kWidth = Lanes<T>::kWidth;
  static constexpr int64_t kMaxDim = 64;

  // Columns of V are taken four at a time: x is then loaded once for four products, and the sums
  // stay in registers.
  template <class F>
  [[gnu::always_inline]] void for_blocks(F&& f) const {
    int64_t k = 0;
    for (; k + 4 <= dim_; k += 4) f.template operator()<4>(k);
    switch (dim_ - k) {
      case 3:
        return f.template operator()<3>(k);
      case 2:
        return f.template operator()<2>(k);
      case 1:
        return f.template operator()<1>(k);
    }
  }

  // Not inlined: it would be most of the code, and few sketches have more than four columns.
  template <int R, class Source>
  [[gnu::noinline]] void add_again(const Source& x, int64_t n, int64_t k, Lanes<T>* sum) const {
    typename Source::Found known;
    add<R, 1>(&x, 0, n, k, sum, known);
  }

  template <int R, int kRows, class Source>
  [[gnu::always_inline]] void add(const Source* x, int64_t column, int64_t n, int64_t k,
                                  Lanes<T>* sum, typename Source::Found& found) const {
    const int64_t stride = v_.stride;
    const float* v = v_.data + k * stride + column;
    int64_t c = 0;
    for (; c + kWidth <= n; c += kWidth) {
      add_lanes<R, kRows>([&](int i) { return load_lanes<T>(v + i * stride + c); },
                          [&](int j) { return x[j].lanes(c, found); }, sum);
    }
    if (c == n) return;
    const bool known = column + c == tail_at_;  // not so in a row that the tensor's end cuts short
    add_lanes<R, kRows>(
        [&](int i) {
          return known ? load_lanes<T>(tail_[k + i])
                       : load_some_lanes<T>(v + i * stride + c, n - c);
        },
        [&](int j) { return x[j].last_lanes(c, n - c, found); }, sum);
  }

  template <int R, int kRows, class V, class X>
  [[gnu::always_inline]] static void add_lanes(const V& v, const X& x, Lanes<T>* sum) {
    Lanes<T> vs[R];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) vs[i] = v(i);
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      const Lanes<T> xs = x(j);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) sum[j * R + i].add_product(xs, vs[i]);
    }
  }

  template <int R>
  [[gnu::always_inline]] void write(const Lanes<T>* sum, T* p) const {
    T sums[R];
    if constexpr (R == 4) {
      sum_lanes_of_four(sum, sums);
    } else {
      for (int i = 0; i < R; ++i) sums[i] = sum_lanes(sum[i]);
    }
    for (int i = 0; i < R; ++i) p[i] = sums[i] * scale_;
  }

  const Projection v_;
  const int64_t dim_;
  const int64_t tail_at_;  // the first column behind the last full set of lanes
  const T scale_;
  float tail_[kMaxDim][kWidth];  // V from there on, with zeros behind
  Lanes<T> sums_[kMaxDim];
};

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
