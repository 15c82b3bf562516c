// Low rank's kernels, step by step on one rank's bucket: what is all-reduced stays as it is.
#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "compress/make_plan.h"
#include "kernels/low_rank.h"
#include "state/bucket_state.h"

namespace arc_topk::testing {

using Sizes = std::vector<std::vector<int64_t>>;

// Widths around a register and a block, several strips, a row that is cut short (by row_width).
inline const Sizes kShapes = {{37, 53}, {5, 1100}, {1030, 9}, {64, 16},
                              {7},      {1, 300},  {300, 1},  {2, 512}};

struct Setting {
  at::ScalarType gradient;
  DType wire;
  DType state = DType::kF32;
  FeedbackKind feedback = FeedbackKind::kEF14;
  std::optional<int64_t> row_width{};
  int64_t rank = 5;
  Sizes shapes = kShapes;
  int world_size = 1;
};

inline const Setting kSettings[] = {
    {at::kFloat, DType::kF32},
    {at::kFloat, DType::kBF16, DType::kBF16},
    {at::kFloat, DType::kF32, DType::kF32, FeedbackKind::kNone},
    {at::kDouble, DType::kF64},
    {at::kBFloat16, DType::kF16, DType::kF32, FeedbackKind::kNone},
    {at::kHalf, DType::kF32, DType::kF32, FeedbackKind::kEF14, 150, 3},
    {at::kFloat, DType::kU8},
    {at::kDouble, DType::kU8, DType::kF64, FeedbackKind::kEF14, {}, 5, kShapes, 3},
};

class OneRank {
 public:
  explicit OneRank(const Setting& setting, const LowRankKernels& kernels,
                   bool may_be_unused = false, c10::Device device = c10::kCPU)
      : kernels_(kernels) {
    Config config;
    config.compressor = "low_rank";
    config.feedback = setting.feedback;
    config.rank = setting.rank;
    config.row_width = setting.row_width;
    config.wire_dtype = setting.wire;
    config.state_dtype = setting.state;
    config.compress_without_gain = true;
    std::vector<Layout> layouts;
    std::vector<Shape> shapes;
    int64_t numel = 0;
    for (const auto& sizes : setting.shapes) {
      const at::Tensor like = at::empty(sizes);
      layouts.push_back({at::DimVector(like.sizes()), at::DimVector(like.strides())});
      shapes.push_back(shape_of(like.sizes(), like.strides()));
      shapes.back().stream = static_cast<uint32_t>(shapes.size());
      numel += like.numel();
    }
    gradient_ = at::zeros({numel}, at::TensorOptions(setting.gradient).device(device));
    state_ = make_bucket_state(config, low_rank(), setting.world_size, layouts, shapes, gradient_,
                               may_be_unused);
    state_->take(gradient_);
  }

  // One step; settles before it where asked to.
  void step(const at::Tensor& g, uint64_t number, bool settles = false) {
    if (settles) kernels_.settle(state_->bucket);
    prepare(g, number);
    finish();
  }
  void prepare(const at::Tensor& g, uint64_t number) {
    gradient_.copy_(g);
    kernels_.prepare(state_->bucket, 11, number);
  }
  // What the sum over ranks makes of the flags where another has used this tensor.
  void used_elsewhere(size_t segment) {
    const Segment& s = state_->plan.segments[segment];
    const std::vector<at::Tensor>& payload =
        state_->bucket.directions != nullptr ? state_->narrow : state_->first;
    if (s.compressed()) payload[0][s.flag] += 1;
  }
  void finish() {
    kernels_.orthonormalise(state_->bucket);
    kernels_.multiply_back(state_->bucket);
    kernels_.apply(state_->bucket);
  }
  // Kernels then take it for a bucket that no cache holds.
  void claim_to_be_large() { state_->bucket.numel = int64_t{1} << 40; }
  void settle() { kernels_.settle(state_->bucket); }
  void take_scale(double scale) { state_->take_scale(at::scalar_tensor(scale, at::kDouble)); }
  void reclaim() { kernels_.reclaim(state_->bucket); }
  at::Tensor residual() {
    settle();
    return state_->own_a.clone();
  }

  std::vector<at::Tensor> everything() const {
    std::vector<at::Tensor> all{gradient_, state_->left, state_->basis, state_->picks};
    for (const at::Tensor& one : {state_->own_a, state_->right}) {
      if (one.defined()) all.push_back(one);
    }
    for (const auto* payload : {&state_->narrow, &state_->second}) {
      if (!payload->empty()) all.push_back((*payload)[0]);
    }
    return all;
  }
  const BucketState& state() const { return *state_; }
  const at::Tensor& result() const { return gradient_; }

 private:
  const LowRankKernels& kernels_;
  at::Tensor gradient_;
  std::unique_ptr<BucketState> state_;
};

inline at::Tensor random_gradient(int64_t numel, uint64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn({numel}, generator, at::TensorOptions(at::kDouble));
}

inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.nbytes() != b.nbytes()) return false;
  return a.nbytes() == 0 ||  // which has no address, and memcmp must have one
         std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

}  // namespace arc_topk::testing
