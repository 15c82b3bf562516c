#include "state/backend.h"

#include <array>
#include <stdexcept>

namespace arc_topk {
namespace {

std::array<Backend, c10::COMPILE_TIME_MAX_DEVICE_TYPES>& replacements() {
  static std::array<Backend, c10::COMPILE_TIME_MAX_DEVICE_TYPES> backends{};
  return backends;
}

}  // namespace

Backend backend_for(c10::Device device) {
  const Backend& replacement = replacements().at(static_cast<size_t>(device.type()));
  if (replacement.kernels != nullptr) return replacement;
  if (device.is_cpu()) return {&cpu_kernels(), std::nullopt};
  if (device.is_cuda() && cuda_kernels() != nullptr) return {cuda_kernels(), device};
  throw std::invalid_argument(
      "arc_topk: the gradient is on device '" + device.str() +
      "', but this build has kernels for " +
      (cuda_kernels() != nullptr ? "'cpu' and 'cuda' only" : "'cpu' only: build it with nvcc"));
}

void set_backend(c10::DeviceType type, Backend backend) {
  replacements().at(static_cast<size_t>(type)) = backend;
}

}  // namespace arc_topk
