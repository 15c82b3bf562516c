// What runs the CUDA kernels in a test: the host their bodies, or a GPU where
// ARC_TOPK_TEST_DEVICE=cuda asks for it (`make gpu-check` does).
#pragma once

#include <string>
#include <string_view>

#include "kernels/kernels.h"

namespace arc_topk::testing {

// "host", or "cuda" where it was asked for.
std::string kernels_asked_for();

// On buckets in host memory, by way of OnDevice. Throws where they cannot be run.
const Kernels& kernels_on(std::string_view name);

}  // namespace arc_topk::testing
