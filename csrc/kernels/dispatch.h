// From what a bucket says at run time to the C++ types of it, for every device.
#pragma once

#include "base/numbers.h"
#include "feedback/feedback.h"
#include "kernels/kernels.h"

namespace arc_topk {

// Calls f with an element of the C++ type that `type` stands for.
template <class F>
ARC_TOPK_HD decltype(auto) with_type(DType type, F&& f) {
  switch (type) {
    case DType::kF64:
      return f(double{});
    case DType::kBF16:
      return f(numbers::BF16{});
    case DType::kF16:
      return f(numbers::F16{});
    case DType::kU8:  // levels.h reads and writes those
    case DType::kF32:
      break;
  }
  return f(float{});
}

// Calls f with an element of the bucket's work type: on the host.
template <class F>
decltype(auto) with_work_type(const Bucket& b, F&& f) {
  return b.gradient_type == DType::kF64 ? f(double{}) : f(float{});
}

// Calls f with the feedback of a kind, over T.
template <class T, class F>
ARC_TOPK_HD decltype(auto) with_feedback(FeedbackKind kind, T eta, T keep, F&& f) {
  switch (kind) {
    case FeedbackKind::kEF14:
      return f(EF14{});
    case FeedbackKind::kEF21:
      return f(EF21{});
    case FeedbackKind::kEF21M:
      return f(EF21M<T>{eta, keep});
    case FeedbackKind::kNone:
      break;
  }
  return f(NoFeedback{});
}

// Calls f with the bucket's feedback over its work type, and an element of that: on the host.
template <class F>
decltype(auto) with_feedback(const Bucket& b, F&& f) {
  return with_work_type(b, [&]<class T>(T) {
    return with_feedback(b.feedback, static_cast<T>(b.eta), static_cast<T>(1 - b.eta),
                         [&](const auto& feedback) { return f(feedback, T{}); });
  });
}

}  // namespace arc_topk
