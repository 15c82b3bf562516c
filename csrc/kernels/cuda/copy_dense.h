// Tensors that stay dense, into their payload.
#pragma once

#include "kernels/cuda/message.h"

namespace arc_topk::cuda {

// Never cut off: an infinity must arrive.
template <class G, class Block, class T>
ARC_TOPK_DEVICE void copy_dense(Block& block, const Bucket& b, const Segment& s, Range range,
                                T wire_scale) {
  constexpr int kVector = 16 / sizeof(G);
  const Array<G> gradient(b.gradient, b.gradient_type);
  const Array<AnyType> to(s.dense_in_first ? b.first : b.second,
                          s.dense_in_first ? kTypeOf<T> : b.wire_type);
  // Within Top-K's message of bytes a payload begins anywhere.
  const bool aligned = reinterpret_cast<uintptr_t>(to.base) % 16 == 0;
  for_runs<kVector>(block, range.begin, range.end, [&](Run run) {
    T x[kVector];
    gradient.load(run, x);
    const Run there = run.moved(s.packed - s.offset);
    ARC_TOPK_UNROLL
    for (int j = 0; j < kVector; ++j) {
      x[j] = x[j] * wire_scale;
      const T one[1] = {x[j]};
      if (!aligned && run.has(j)) to.store(Run{there.index + j, 0, 1}, one);
    }
    if (aligned) to.store(there, x);
  });
}

// For a compressor whose other tensors have kernels of their own.
template <class G, class T>
struct CopyDense {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {};

  Bucket b;
  T wire_scale;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    if (!s.compressed()) copy_dense<G>(block, b, s, range_of(s, p), wire_scale);
  }
};

}  // namespace arc_topk::cuda
