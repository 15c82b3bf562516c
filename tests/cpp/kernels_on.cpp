#include "kernels_on.h"

#include <cstdlib>
#include <stdexcept>

#include "cuda_on_host.h"
#include "on_device.h"

namespace arc_topk::testing {

std::string kernels_asked_for() {
  const char* device = std::getenv("ARC_TOPK_TEST_DEVICE");
  const std::string name = device != nullptr ? device : "cpu";
  return name == "cpu" ? "host" : name;
}

const Kernels& kernels_on(std::string_view name) {
  static const CudaOnHost bodies;
  static const OnDevice on_host(bodies, c10::kCPU);
  if (name == "host") return on_host;
  if (name != "cuda")
    throw std::runtime_error("ARC_TOPK_TEST_DEVICE is '" + std::string(name) +
                             "'; expected cpu or cuda");
  if (cuda_kernels() == nullptr)
    throw std::runtime_error("ARC_TOPK_TEST_DEVICE is cuda, but no kernels were built");
  static const OnDevice on_cuda(*cuda_kernels(), c10::Device(c10::kCUDA, 0));
  return on_cuda;
}

}  // namespace arc_topk::testing
