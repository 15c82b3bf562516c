// Steps whose mean gradient is dense.
#pragma once

#include "kernels/cuda/message.h"

namespace arc_topk::cuda {

// gradient *= 1 / N.
template <class T>
struct Divide {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = kVectorOf<T>;
  struct Shared {};

  Bucket b;
  T one_over_n;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    const Piece& p = b.pieces[block.index()];
    const Range range = range_of(b.segments[p.segment], p);
    const Array<AnyType> gradient(b.gradient, b.gradient_type);
    for_runs<kVector>(block, range.begin, range.end, [&](Run run) {
      T x[kVector];
      gradient.load(run, x);
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) x[j] = x[j] * one_over_n;
      gradient.store(run, x);
    });
  }
};

// The gradient into an array of the state, at its scale, and zeros into another.
template <class T>
struct CopyGradient {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = kVectorOf<T>;
  struct Shared {};

  Bucket b;
  void* to;
  void* zero;  // null: none

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    const Piece& p = b.pieces[block.index()];
    const Range range = range_of(b.segments[p.segment], p);
    for_runs<kVector>(block, range.begin, range.end, [&](Run run) {
      T x[kVector];
      Array<AnyType>(b.gradient, b.gradient_type).load(run, x);
      multiply(x, LossScale<T>(b).down);
      Array<AnyType>(to, b.state_type).store(run, x);
      const T nothing[kVector] = {};
      if (zero != nullptr) Array<AnyType>(zero, b.state_type).store(run, nothing);
    });
  }
};

// Whether the gradient has an element that is not finite: a counter that becomes 1.
template <class T>
struct FindNonFinite {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = kVectorOf<T>;
  struct Shared {};

  Bucket b;
  uint32_t* found;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    const Piece& p = b.pieces[block.index()];
    const Range range = range_of(b.segments[p.segment], p);
    for_runs<kVector>(block, range.begin, range.end, [&](Run run) {
      T x[kVector];
      Array<AnyType>(b.gradient, b.gradient_type).load(run, x);
      for (int j = 0; j < kVector; ++j) {
        if (!is_finite(x[j])) block.mark(found, 1u);
      }
    });
  }
};

// Sets counters in the device's memory to zero.
struct Clear {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {};

  uint32_t* at;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    block.each([&](int t) {
      if (t == 0) *at = 0;
    });
  }
};

}  // namespace arc_topk::cuda
