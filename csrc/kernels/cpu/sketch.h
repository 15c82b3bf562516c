// The sketch of one row: P_j = X_j V / sqrt(r), r dot products of the same row.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/cpu/lanes.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

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
    for_blocks([&]<int R>(int64_t k) {
      Lanes<T> sum[R] = {};
      add<R>(x, 0, n, k, sum);
      for (int i = 0; i < R; ++i) p[k + i] = sum_lanes(sum[i]) * scale_;
    });
  }

  // A longer row comes in parts: begin(), part() for each, end(). Parts begin at multiples of
  // kWidth.
  void begin() { std::fill_n(sums_, dim_, Lanes<T>{}); }
  void part(const T* x, int64_t column, int64_t n) {
    for_blocks([&]<int R>(int64_t k) {
      Lanes<T> sum[R];
      for (int i = 0; i < R; ++i) sum[i] = sums_[k + i];
      add<R>(x, column, n, k, sum);
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
  void for_blocks(F&& f) const {
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

  template <int R>
  [[gnu::always_inline]] void add(const T* x, int64_t column, int64_t n, int64_t k,
                                  Lanes<T>* sum) const {
    const float* v = v_.data + k * v_.stride + column;
    int64_t c = 0;
    for (; c + kWidth <= n; c += kWidth) {
      const Lanes<T> xs = load_lanes<T>(x + c);
      for (int i = 0; i < R; ++i) sum[i].add_product(xs, load_lanes<T>(v + i * v_.stride + c));
    }
    if (c == n) return;
    const Lanes<T> xs = load_some_lanes<T>(x + c, n - c);
    const bool known = column + c == tail_at_;  // not so in a row that the tensor's end cuts short
    for (int i = 0; i < R; ++i) {
      sum[i].add_product(xs, known ? load_lanes<T>(tail_[k + i])
                                   : load_some_lanes<T>(v + i * v_.stride + c, n - c));
    }
  }

  const Projection v_;
  const int64_t dim_;
  const int64_t tail_at_;  // the first column behind the last full set of lanes
  const T scale_;
  float tail_[kMaxDim][kWidth];  // V from there on, with zeros behind
  Lanes<T> sums_[kMaxDim];
};

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
