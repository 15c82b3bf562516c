// What the loss was multiplied with, for every device: gradients and results are so many times what
// the state is of.
#pragma once

#include "kernels/kernels.h"

namespace arc_topk {

template <class T>
struct LossScale {
  bool given;
  T up;
  T down;

  // Reads device memory where that is where the bucket lies.
  ARC_TOPK_HD explicit LossScale(const Bucket& b)
      : given(b.loss_scale != nullptr),
        up(given ? static_cast<T>(b.loss_scale[0]) : T(1)),
        down(given ? static_cast<T>(b.loss_scale[1]) : T(1)) {}
};

// A GradScaler lowers its scale where, and only where, it has skipped a step.
ARC_TOPK_HD bool was_skipped(const Bucket& b) {
  return b.loss_scale != nullptr && *b.loss_scale < *b.scale_before;
}

// What a picked row in `second` is multiplied with to give what this rank gets back of a step that
// was skipped: the mean, or its own part where payloads are not summed on their way.
ARC_TOPK_HD double share_of_sent(const Bucket& b) {
  return b.wire_scale == 1 ? 1.0 : 1.0 / b.wire_scale / b.world_size;
}

}  // namespace arc_topk
