// What launches of several compressors have in common.
#pragma once

#include "kernels/cuda/scan.h"

namespace arc_topk::cuda {

template <class Launcher, class Body>
void launch_on(const Launcher& launcher, const Bucket& b, const char* name, const Body& body,
               int64_t blocks) {
  if (blocks > 0) launcher.launch(b, name, body, blocks);
}

template <class Launcher>
void launch_scan(const Launcher& launcher, const Bucket& b) {
  switch (size_of(b.gradient_type)) {
    case 8:
      return launch_on(launcher, b, "scan", Scan<uint64_t>{b}, b.num_pieces);
    case 4:
      return launch_on(launcher, b, "scan", Scan<uint32_t>{b}, b.num_pieces);
    default:
      return launch_on(launcher, b, "scan", Scan<uint16_t>{b}, b.num_pieces);
  }
}

// Calls f with an element of the gradient's type, where T is the work type.
template <class T, class F>
void with_gradient(DType type, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(double{});
  } else if (type == DType::kF32) {
    f(float{});
  } else if (type == DType::kBF16) {
    f(BF16{});
  } else {
    f(F16{});
  }
}

}  // namespace arc_topk::cuda
