// The message X_i and this rank's own state, a vector of elements at a time.
#pragma once

#include "kernels/cuda/pieces.h"
#include "kernels/loss_scale.h"
#include "kernels/wire.h"

namespace arc_topk::cuda {

// Gradient and state of a run, in the work type.
template <class T, int kVector>
struct Values {
  T g[kVector];
  T a[kVector];
  T b[kVector];
};

// x[] *= factor.
template <class T, int kVector>
ARC_TOPK_DEVICE void multiply(T (&x)[kVector], T factor) {
  ARC_TOPK_UNROLL
  for (int j = 0; j < kVector; ++j) x[j] = x[j] * factor;
}

// Where they lie. G, S: the C++ types, or AnyType.
template <class Feedback, class G, class S, class T>
struct Arrays {
  static constexpr int kStates = own_states(Feedback::kKind);
  Array<G> g;
  Array<S> a;
  Array<S> b;
  T unscale;

  ARC_TOPK_DEVICE Arrays(const Bucket& bucket, const LossScale<T>& scale)
      : g(bucket.gradient, bucket.gradient_type),
        a(bucket.own_a, bucket.state_type),
        b(bucket.own_b, bucket.state_type),
        unscale(scale.down) {}

  // The gradient as if the loss had not been scaled.
  template <int kVector>
  ARC_TOPK_DEVICE void load(Run run, Values<T, kVector>& x) const {
    g.load(run, x.g);
    multiply(x.g, unscale);
    load_own(run, x);
  }
  template <int kVector>
  ARC_TOPK_DEVICE void load_own(Run run, Values<T, kVector>& x) const {
    if constexpr (kStates > 0) a.load(run, x.a);
    if constexpr (kStates > 1) b.load(run, x.b);
  }
};

// The message of a run before this step's prepare(): x[] = X_i. A candidate that is not finite is
// left out, the old state taken in its place. Returns whether all of it was finite.
template <class Feedback, class S, class T, int kVector>
ARC_TOPK_DEVICE bool form(const Feedback& feedback, const Array<S>& state,
                          const Values<T, kVector>& e, T (&x)[kVector]) {
  constexpr int kStates = own_states(Feedback::kKind);
  constexpr bool kKeeps = keeps_message(Feedback::kKind);
  bool all_finite = true;
  ARC_TOPK_UNROLL
  for (int j = 0; j < kVector; ++j) {
    const T old = kStates > 0 ? e.a[j] : T(0);
    T a = old;
    T b = kStates > 1 ? e.b[j] : T(0);
    feedback.prepare(e.g[j], a, b);
    if constexpr (kKeeps) a = state.rounded(a);
    const T message = feedback.message(e.g[j], a, b);
    const bool finite = is_finite(message);
    all_finite = all_finite && finite;
    x[j] = finite || !kKeeps ? message : old;
  }
  return all_finite;
}

// X_i of a run: as prepare() left it where `prepared`, else as prepare() would form it.
template <class Feedback, class S, class T, int kVector>
ARC_TOPK_DEVICE void message(const Feedback& feedback, const Array<S>& state,
                             const Values<T, kVector>& e, bool prepared, T (&x)[kVector]) {
  if (keeps_message(Feedback::kKind) && prepared) {
    ARC_TOPK_UNROLL
    for (int j = 0; j < kVector; ++j) x[j] = e.a[j];
  } else {
    form(feedback, state, e, x);
  }
}

// The state as it was before prepare(), where the message is kept in it. An element whose candidate
// was not finite was never stored: it would not be finite now either, since its gradient is not.
template <class Feedback, class S, class T, int kVector>
ARC_TOPK_DEVICE void undo(const Feedback& feedback, const Array<S>& state,
                          const Values<T, kVector>& e, T (&x)[kVector]) {
  ARC_TOPK_UNROLL
  for (int j = 0; j < kVector; ++j) {
    T candidate = e.a[j];
    T before = e.a[j];
    T other = own_states(Feedback::kKind) > 1 ? e.b[j] : T(0);
    feedback.prepare(e.g[j], candidate, other);
    feedback.undo(e.g[j], before, other);
    x[j] = is_finite(state.rounded(candidate)) ? before : e.a[j];
  }
}

// --- flags ---------------------------------------------------------------------------------------

ARC_TOPK_DEVICE void write_flag(const Bucket& b, int64_t i, bool used, bool bad) {
  if (b.flag_type == DType::kU8) {  // two bytes: kernels/directions.h
    auto* bytes = static_cast<uint8_t*>(b.flags) + i;
    bytes[0] = used && !bad ? 1 : 0;
    bytes[1] = bad ? 1 : 0;
    return;
  }
  with_type(b.flag_type, [&]<class S>(S) {
    const float value = bad ? numbers::float_of(0x7F800000u) : used ? 1.0f : 0.0f;
    static_cast<S*>(b.flags)[i] = narrow_to<S>(value);
  });
}

// What the flags of a segment say, summed by an all-reduce or, if `gathered` is given, here.
ARC_TOPK_DEVICE Outcome read_outcome(const Bucket& b, const Segment& s, const Gathered* gathered) {
  if (b.flag_type == DType::kU8) {
    const auto* bytes = static_cast<const uint8_t*>(b.flags) + s.flag;
    return bytes[1] != 0   ? Outcome::kNonFinite
           : bytes[0] == 0 ? Outcome::kUnused
                           : Outcome::kNormal;
  }
  const int64_t copies = gathered != nullptr ? b.world_size : 1;
  const char* flags = static_cast<const char*>(b.flags);
  if (gathered != nullptr) {
    flags = static_cast<const char*>(gathered->data) +
            (flags - static_cast<const char*>(gathered->own));
  }
  float sum = 0;
  for (int64_t copy = 0; copy < copies; ++copy) {
    const char* at = flags + (gathered != nullptr ? copy * gathered->stride : 0);
    with_type(b.flag_type,
              [&]<class S>(S) { sum += widen_to<float>(read_unaligned<S>(at, s.flag)); });
  }
  return !is_finite(sum) ? Outcome::kNonFinite : sum == 0 ? Outcome::kUnused : Outcome::kNormal;
}

}  // namespace arc_topk::cuda
