// The shared estimate h where it is handed out as the result, as it lies: see Kernels::publish().
#pragma once

#include "kernels/cuda/elements.h"

namespace arc_topk::cuda {

// DDP relies on the gradient's type, a scaler on its scale. The result of a tensor that nobody used
// is zeros, whatever its estimate, and the host does not know which those are.
ARC_TOPK_HD bool hands_out_estimate(const Bucket& b) {
  return b.shared != nullptr && b.state_type == b.gradient_type && !b.may_be_unused &&
         !b.result_in_gradient && b.loss_scale == nullptr;
}

// A segment's result is not finite, but what h is stays: NaN takes the place of its first element.
ARC_TOPK_DEVICE void withhold(const Bucket& b, int64_t segment) {
  if (b.is_withheld[segment] != 0) return;
  b.is_withheld[segment] = 1;
  with_type(b.state_type, [&]<class S>(S) {
    S& first = static_cast<S*>(b.shared)[b.segments[segment].offset];
    static_cast<S*>(b.withheld)[segment] = first;
    first = narrow_to<S>(numbers::float_of(0x7FC00000u));
  });
}

// Before the segment's next step looks at h.
ARC_TOPK_DEVICE void give_back(const Bucket& b, int64_t segment) {
  if (b.is_withheld == nullptr || b.is_withheld[segment] == 0) return;
  b.is_withheld[segment] = 0;
  with_type(b.state_type, [&]<class S>(S) {
    static_cast<S*>(b.shared)[b.segments[segment].offset] = static_cast<S*>(b.withheld)[segment];
  });
}

}  // namespace arc_topk::cuda
