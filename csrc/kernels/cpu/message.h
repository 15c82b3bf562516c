// The message X_i and this rank's own state, a chunk of elements at a time.
#pragma once

#include "kernels/cpu/convert.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// EF14 and EF21M keep X_i in their first array between prepare() and sent(): the message is what is
// stored, rounded to the state's type. The others form it from the gradient whenever it is needed.
constexpr bool keeps_message(FeedbackKind kind) {
  return kind == FeedbackKind::kEF14 || kind == FeedbackKind::kEF21M;
}

// Calls f with the bucket's feedback over its work type.
template <class F>
inline decltype(auto) with_feedback(const Bucket& b, F&& f) {
  const auto over = [&]<class T>(T) -> decltype(auto) {
    switch (b.feedback) {
      case FeedbackKind::kEF14:
        return f(EF14{}, T{});
      case FeedbackKind::kEF21:
        return f(EF21{}, T{});
      case FeedbackKind::kEF21M:
        return f(EF21M<T>{static_cast<T>(b.eta), static_cast<T>(1 - b.eta)}, T{});
      case FeedbackKind::kNone:
        break;
    }
    return f(NoFeedback{}, T{});
  };
  return b.gradient_type == DType::kF64 ? over(double{}) : over(float{});
}

// Calls f with the bucket's work type.
template <class F>
inline decltype(auto) with_work_type(const Bucket& b, F&& f) {
  return b.gradient_type == DType::kF64 ? f(double{}) : f(float{});
}

// Elements of the bucket's arrays in the work type; a and b are null for kinds that keep less.
template <class T>
struct Elements {
  T* g;
  T* a;
  T* b;
};

template <class T>
struct Buffers {
  alignas(64) T g[kChunk];
  alignas(64) T a[kChunk];
  alignas(64) T b[kChunk];
  alignas(64) T x[kChunk];
};

// The message of n elements before this step's prepare(): x[] = X_i. For kinds that keep it, x may
// be e.a itself. A candidate that is not finite is left out, the old state taken in its place.
template <class S, class F, class T>
inline bool form(const F& feedback, const Elements<T>& e, int64_t n, T* x) {
  constexpr int kStates = own_states(F::kKind);
  int nonfinite = 0;
#pragma GCC ivdep  // x is e.a, or overlaps none of them
  for (int64_t i = 0; i < n; ++i) {
    const T old = kStates > 0 ? e.a[i] : T(0);
    T a = old;
    T b = kStates > 1 ? e.b[i] : T(0);
    feedback.prepare(e.g[i], a, b);
    if constexpr (keeps_message(F::kKind)) a = widen_to<T>(narrow_to<S>(a));
    const T message = feedback.message(e.g[i], a, b);
    const bool finite = is_finite(message);
    nonfinite |= !finite;
    x[i] = finite || !keeps_message(F::kKind) ? message : old;
  }
  return nonfinite == 0;
}

// form() for the state's type, which matters where the message is kept in it.
template <class F, class T>
inline bool form(const Bucket& bucket, const F& feedback, const Elements<T>& e, int64_t n, T* x) {
  if constexpr (keeps_message(F::kKind)) {
    return with_type(bucket.state_type, [&]<class S>(S) { return form<S>(feedback, e, n, x); });
  } else {
    return form<T>(feedback, e, n, x);
  }
}

// X_i of n elements: as prepare() left it where `prepared`, else as prepare() would form it. Gives
// back where it lies: e.a, e.g or `buffer`.
template <class F, class T>
inline const T* message(const Bucket& bucket, const F& feedback, const Elements<T>& e, int64_t n,
                        bool prepared, T* buffer) {
  if constexpr (F::kKind == FeedbackKind::kNone) return e.g;
  if constexpr (keeps_message(F::kKind)) {
    if (prepared) return e.a;
  }
  form(bucket, feedback, e, n, buffer);
  return buffer;
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
