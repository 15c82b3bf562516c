// Rows to the uint8 wire and back, a vector of elements at a time.
#pragma once

#include "kernels/cuda/message.h"
#include "kernels/levels.h"

namespace arc_topk::cuda {

// D of a row, from the shares that were summed on their way.
template <class T>
ARC_TOPK_DEVICE T unit_of(const Bucket& b, const Segment& s, const Levels<T>& levels, int64_t row) {
  return levels.unit((static_cast<const T*>(b.first) + s.units(b.sketch_dim))[row]);
}

// x[] becomes what arrives of it, C_i. Its bytes go to the payload where `stores`.
template <class T, int kVector>
ARC_TOPK_DEVICE void send_levels(const Bucket& b, const Segment& s, const Levels<T>& levels,
                                 int64_t row, Run run, Run to, bool stores, T (&x)[kVector]) {
  const T unit = unit_of(b, s, levels, row);
  const T inverse = Levels<T>::inverse(unit);
  T bytes[kVector];
  ARC_TOPK_UNROLL
  for (int j = 0; j < kVector; ++j) {
    const T level = run.has(j) ? levels.level(x[j], inverse) : T(0);
    bytes[j] = level + levels.most;
    x[j] = level * unit;
  }
  if (stores) Array<uint8_t>(b.second, DType::kU8).store(to, bytes);
}

// C, from the bytes that were summed on their way.
template <class T, int kVector>
ARC_TOPK_DEVICE void mean_of_levels(const Bucket& b, const Segment& s, const Levels<T>& levels,
                                    int64_t row, Run from, T (&mean)[kVector]) {
  Array<uint8_t>(b.second, DType::kU8).load(from, mean);
  const T factor = levels.factor(unit_of(b, s, levels, row));
  ARC_TOPK_UNROLL
  for (int j = 0; j < kVector; ++j) mean[j] = levels.mean_level(mean[j]) * factor;
}

}  // namespace arc_topk::cuda
