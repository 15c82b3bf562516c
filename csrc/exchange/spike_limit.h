// Config::spike_limit: scales a bucket's gradients down to at most so many times their running
// norm, before anything else is done with them. arc_topk/reference/spike_limit.py is the same in
// words.
//
// All of it is torch's own operations on numbers that stay on the gradient's device: on the current
// stream, and nothing waits.
#pragma once

#include <ATen/core/Tensor.h>

namespace arc_topk {

class SpikeLimit {
 public:
  // `work`: the type of norms.
  SpikeLimit(double factor, c10::Device device, at::ScalarType work);

  void apply(at::Tensor& gradient);

 private:
  const double factor_;
  const at::Tensor one_;
  // The running norm is sum_ / weight_; both are zero before the first norm.
  at::Tensor sum_, weight_;
  at::Tensor norm_, limited_, scale_, gain_;  // of a step
};

}  // namespace arc_topk
