// What a user chose: arc_topk/config.py validates and explains the fields; this is the same, in
// C++.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kernels/kernels.h"

namespace arc_topk {

struct Config {
  std::string compressor = "arc_topk";
  FeedbackKind feedback = FeedbackKind::kEF14;
  double ratio = 0.1;
  std::optional<int64_t> rank;  // low rank: k of every matrix; none: by the ratio
  int64_t sketch_dim = 4;
  std::optional<int64_t> row_width;
  double eta = 0.1;
  int64_t start_step = 0;
  int64_t warmup_steps = 0;            // behind start_step; 0: none
  std::string warmup = "exponential";  // or "linear"
  std::optional<DType> wire_dtype;     // none: the gradient's
  std::optional<DType> sketch_dtype;   // none: what sums are made in
  std::optional<DType> state_dtype;    // none: float32
  uint64_t seed = 0;
  std::optional<double> spike_limit;    // none: no limit
  int64_t check_every = 0;              // 0: never
  std::optional<int64_t> resync_every;  // none: by the wire's type; 0: never
  bool adaptive = false;                // dense, bfloat16 or compressed by what they take here
  bool compress_without_gain = false;  // tests alone: ratio 1 by way of sketch, select, pack, apply
};

}  // namespace arc_topk
