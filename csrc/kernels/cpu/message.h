// The message X_i and this rank's own state, a chunk of elements at a time.
#pragma once

#include "kernels/cpu/convert.h"
#include "kernels/loss_scale.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

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

// n elements of the gradient as if the loss had not been scaled: where they lie, or in `buffer`.
template <class T>
inline T* unscaled(const Bucket& b, T* g, int64_t n, T* buffer) {
  const LossScale<T> scale(b);
  if (!scale.given) return g;
  for (int64_t i = 0; i < n; ++i) buffer[i] = g[i] * scale.down;
  return buffer;
}

// x as the result is to be.
template <class T>
inline void scale_up(const Bucket& b, T* x, int64_t n) {
  const LossScale<T> scale(b);
  if (!scale.given) return;
  for (int64_t i = 0; i < n; ++i) x[i] *= scale.up;
}

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
