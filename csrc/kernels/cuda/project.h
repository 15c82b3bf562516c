// V for one step, four of its columns a thread.
#pragma once

#include "base/random.h"
#include "kernels/cuda/block.h"
#include "kernels/cuda/elements.h"

namespace arc_topk::cuda {

struct Project {
  static constexpr int kThreads = cuda::kThreads;
  struct Shared {};

  float* data;
  int64_t stride;
  int64_t begin;
  int64_t end;
  int64_t sketch_dim;
  uint64_t seed;
  uint64_t step;

  int64_t blocks() const { return divide_up(end - begin, kThreads) * divide_up(sketch_dim, 4); }

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    const int64_t groups = divide_up(sketch_dim, 4);
    const int64_t group = block.index() % groups;
    block.each([&](int t) {
      const int64_t row = begin + block.index() / groups * kThreads + t;
      if (row >= end) return;
      const Normals four =
          projection_normals(static_cast<uint32_t>(row), static_cast<uint32_t>(group), seed, step);
      ARC_TOPK_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (group * 4 + j < sketch_dim) data[(group * 4 + j) * stride + row] = four.z[j];
      }
    });
  }
};

}  // namespace arc_topk::cuda
