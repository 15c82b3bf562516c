// Configurations and shapes by chance: the same ones in every run, as many as ARC_TOPK_FUZZ says.
#pragma once

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "config.h"

namespace arc_topk::testing {

// `make fuzz` asks for 10000; in a usual run a few hundred will do.
inline int fuzz_cases() {
  const char* const asked = std::getenv("ARC_TOPK_FUZZ");
  return asked != nullptr ? std::atoi(asked) : 300;
}

class Chance {
 public:
  explicit Chance(int number) : engine_(static_cast<uint64_t>(number)) {}

  // In [low, high], each as likely. (The library's distributions are another in another library.)
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  // In [1, 2^bits], small ones as likely as large ones, and the ends of the range more often.
  int64_t size(int bits) {
    const int64_t most = int64_t{1} << integer(0, bits);
    return integer(0, 3) == 0 ? most : integer(1, most);
  }
  template <class T, size_t kCount>
  T one_of(const T (&values)[kCount]) {
    return values[integer(0, kCount - 1)];
  }
  double share() {  // in (0, 1]
    const double ends[] = {1e-300, 1e-9, 0.5, 1 - 1e-16, 1};
    if (integer(0, 4) == 0) return one_of(ends);
    return static_cast<double>(integer(1, 1 << 20)) / (1 << 20);
  }

  Config config() {
    const char* const compressors[] = {"arc_topk", "rand_k", "top_k", "dense", "low_rank"};
    const FeedbackKind feedbacks[] = {FeedbackKind::kNone, FeedbackKind::kEF14, FeedbackKind::kEF21,
                                      FeedbackKind::kEF21M};
    const DType states[] = {DType::kF32, DType::kBF16};
    Config config;
    config.compressor = one_of(compressors);
    config.feedback = one_of(feedbacks);
    config.ratio = share();
    config.sketch_dim = integer(1, 64);
    if (integer(0, 2) == 0) config.row_width = size(31) - (integer(0, 1) == 0 ? 0 : 1);
    if (config.row_width && (*config.row_width < 1 || *config.row_width > 2147483647)) {
      config.row_width = 2147483647;
    }
    config.eta = share();
    config.start_step = integer(0, 3) == 0 ? 1 : 0;
    if (integer(0, 2) == 0) config.warmup_steps = integer(1, 6);
    if (integer(0, 1) == 0) config.wire_dtype = type();
    if (config.compressor == "arc_topk" || config.compressor == "low_rank") {
      if (integer(0, 2) == 0) config.wire_dtype = DType::kU8;
      if (integer(0, 1) == 0) config.sketch_dtype = DType::kBF16;
    }
    if (integer(0, 1) == 0) config.state_dtype = one_of(states);
    config.seed = engine_();
    config.check_every = integer(0, 2);
    if (integer(0, 1) == 0) config.resync_every = integer(0, 2);
    config.compress_without_gain = integer(0, 3) == 0;
    if (config.compressor == "low_rank") {
      if (shares_estimate(config.feedback)) config.feedback = FeedbackKind::kEF14;
      if (integer(0, 1) == 0) config.rank = size(6);
    }
    return config;
  }
  DType type() {
    const DType types[] = {DType::kF32, DType::kF64, DType::kBF16, DType::kF16};
    return one_of(types);
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace arc_topk::testing
