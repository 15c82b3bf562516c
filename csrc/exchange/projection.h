// V of the current step, the same on all ranks.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "state/bucket_state.h"

namespace arc_topk {

// One V a step, of which a matrix with n columns uses the first n rows: made as far as the widest
// matrix so far needs it, by whichever bucket comes first. For the thread that prepares.
class SharedProjection {
 public:
  Projection of(uint64_t step, const BucketState& state, int64_t rows, uint64_t seed);
  void forget() { v_.reset(); }  // before buckets of another device come

 private:
  at::Tensor v_;
  uint64_t step_ = 0;
  int64_t rows_ = 0;  // made so far
};

}  // namespace arc_topk
