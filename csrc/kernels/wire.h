// To the wire and back, for every device. Made on the host, once a kernel.
#pragma once

#include "base/numbers.h"
#include "kernels/kernels.h"

namespace arc_topk {

// The largest finite number of a type. What is larger is cut off to it before it is sent, so that
// what was sent is finite, and so is what stays behind in the state.
ARC_TOPK_HD double largest(DType type) {
  switch (type) {
    case DType::kU8:  // levels.h has its own
    case DType::kF64:
      break;
    case DType::kF32:
      return 3.4028234663852886e38;
    case DType::kBF16:
      return numbers::widen(numbers::BF16{0x7F7F});
    case DType::kF16:
      return 65504;
  }
  return 1.7976931348623157e308;
}

template <class T>
struct Wire {
  bool exact;  // the work type, not scaled: nothing is rounded or cut off
  T scale;
  T back;
  T limit;

  ARC_TOPK_HD explicit Wire(const Bucket& b)
      : exact(b.wire_type == numbers::kTypeOf<T> && b.wire_scale == 1),
        scale(static_cast<T>(b.wire_scale)),
        back(static_cast<T>(1 / b.wire_scale)),
        limit(static_cast<T>(largest(b.wire_type))) {}

  // What is sent for x where not exact, before it is rounded. Cut off before it is scaled: the sum
  // of N values then stays within the type as well.
  ARC_TOPK_HD T scaled(T x) const { return (x < -limit ? -limit : limit < x ? limit : x) * scale; }

  ARC_TOPK_HD T sent(T x) const { return exact ? x : scaled(x); }
  ARC_TOPK_HD T received(T x) const { return exact ? x : x * back; }
};

}  // namespace arc_topk
