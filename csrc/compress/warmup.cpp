#include "compress/warmup.h"

#include <algorithm>
#include <cmath>

namespace arc_topk {
namespace {

// Of the stages before the last; all are equally long, up to a step.
int64_t num_stages(const Config& config) { return std::min<int64_t>(config.warmup_steps, 8); }

}  // namespace

int64_t warmup_stage(const Config& config, uint64_t step) {
  const int64_t stages = num_stages(config);
  const int64_t since = static_cast<int64_t>(step) - config.start_step;
  if (stages == 0 || since >= config.warmup_steps) return stages + 1;
  return std::max<int64_t>(since, 0) * stages / config.warmup_steps + 1;
}

double ratio_in_stage(const Config& config, double ratio, int64_t stage) {
  const int64_t stages = num_stages(config);
  if (stage > stages) return ratio;
  const double share = static_cast<double>(stage) / static_cast<double>(stages + 1);
  return config.warmup == "linear" ? 1 + (ratio - 1) * share : std::pow(ratio, share);
}

}  // namespace arc_topk
