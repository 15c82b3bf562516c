#include "exchange/projection.h"

#include <ATen/ops/empty.h>

namespace arc_topk {
namespace {

// The distance between the columns of V, in floats. They are read side by side, four at a time: a
// distance of a power of two would put the same rows of all of them in the same few cache sets. A
// quarter of 4096 bytes and a cache line apart, they and what they are multiplied with do not meet.
int64_t column_stride(int64_t rows) {
  constexpr int64_t kPage = 1024;
  constexpr int64_t kApart = kPage / 4 + 16;
  return (rows + kPage - kApart - 1) / kPage * kPage + kApart;
}

}  // namespace

Projection SharedProjection::of(uint64_t step, const BucketState& state, int64_t rows,
                                uint64_t seed) {
  if (!v_.defined() || v_.size(1) < rows) {
    v_ = at::empty({state.bucket.sketch_dim, column_stride(rows)},
                   at::TensorOptions().dtype(at::kFloat).device(state.device));
    rows_ = 0;
  }
  if (step_ != step) rows_ = 0;
  step_ = step;
  const int64_t stride = v_.size(1);
  auto* data = static_cast<float*>(v_.mutable_data_ptr());
  if (rows_ < rows) {
    state.backend.kernels->project(state.bucket, data, stride, rows_, rows, seed, step);
    rows_ = rows;
  }
  return {data, stride};
}

}  // namespace arc_topk
