#include "exchange/spike_limit.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/div.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/zeros.h>

#include <limits>

namespace arc_topk {
namespace {

constexpr double kWeight = 0.1;  // of a new norm in the running one
constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

SpikeLimit::SpikeLimit(double factor, c10::Device device, at::ScalarType work)
    : factor_(factor), one_(at::ones({}, at::TensorOptions().dtype(work).device(device))) {
  for (at::Tensor* number : {&sum_, &weight_, &norm_, &limited_, &scale_, &gain_}) {
    *number = at::zeros({}, one_.options());
  }
}

void SpikeLimit::apply(at::Tensor& gradient) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  at::linalg_vector_norm_out(norm_, gradient, 2, std::nullopt, false, one_.scalar_type());
  // No running norm is 0 / 0: no limit. minimum() passes on the norm's own NaN.
  at::div_out(limited_, sum_, weight_).mul_(factor_).nan_to_num_(kInfinity, kInfinity);
  at::minimum_out(limited_, norm_, limited_);
  // 1 for a norm of zero, for NaN, and for an infinite one without a limit.
  at::div_out(scale_, limited_, norm_).nan_to_num_(1.0);
  const bool within = gradient.is_cpu() && scale_.item<double>() == 1;
  if (!within) gradient.mul_(scale_);
  // What is zero or not finite does not count.
  at::sign_out(gain_, limited_.nan_to_num_(0.0, 0.0)).mul_(kWeight);
  sum_.lerp_(limited_, gain_);
  weight_.lerp_(one_, gain_);
}

}  // namespace arc_topk
