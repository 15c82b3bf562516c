// What serves a device: its kernels, and the streams that its work is queued on, if it has any.
#pragma once

#include <c10/core/Device.h>

#include <optional>

#include "kernels/kernels.h"

namespace arc_topk {

struct Backend {
  const Kernels* kernels;
  std::optional<c10::Device> streams;  // none: kernels have worked when they return
};

// Throws std::invalid_argument where this build has no kernels for the device.
Backend backend_for(c10::Device device);

// Another backend for a type of device from now on; null kernels: the usual one again. For tests.
void set_backend(c10::DeviceType type, Backend backend);

}  // namespace arc_topk
