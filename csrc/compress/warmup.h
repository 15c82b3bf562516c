// Config::warmup_steps: the ratio begins near 1 and falls to what is asked for (Deep Gradient
// Compression: Lin et al., ICLR 2018). In a few stages, for every change of it makes buckets anew,
// which takes memory.
#pragma once

#include <cstdint>

#include "config.h"

namespace arc_topk {

// The stage of a step: 1, 2, ..., and the last one for good, of the ratio itself. Steps before
// start_step are of the first, so that nothing changes when compression begins.
int64_t warmup_stage(const Config& config, uint64_t step);

// What a ratio is in a stage. It never rises from one to the next, so that what has been compressed
// stays so.
double ratio_in_stage(const Config& config, double ratio, int64_t stage);

}  // namespace arc_topk
