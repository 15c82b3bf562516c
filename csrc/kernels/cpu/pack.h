// The selected rows of the message: onto the wire, and out of what this rank still has to send.
#pragma once

#include "kernels/cpu/levels.h"
#include "kernels/cpu/prepare.h"
#include "kernels/cpu/rows.h"
#include "kernels/wire.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// What arrives of x by the wire: c = round(x * scale) / scale. Cut off before it is scaled: the sum
// of N values then stays within the type as well. Puts the wire's values at `wire` unless that is
// null.
template <class T>
inline const T* round_to_wire(const Bucket& b, const T* x, int64_t n, void* wire, int64_t at,
                              T* buffer) {
  const Wire<T> to_wire(b);
  if (to_wire.exact) {
    if (wire != nullptr) store(x, wire, b.wire_type, at, n);
    return x;
  }
  for (int64_t i = 0; i < n; ++i) buffer[i] = to_wire.scaled(x[i]);
  with_type(b.wire_type, [&]<class W>(W) {
    W rounded[kChunk];
    W* to = wire != nullptr ? static_cast<W*>(wire) + at : rounded;
    narrow_run(buffer, n, to);
    widen_run(to, n, buffer);
  });
  for (int64_t i = 0; i < n; ++i) buffer[i] *= to_wire.back;
  return buffer;
}

template <class F, class T>
inline void pack_rows(const Bucket& b, const Piece& p, const F& feedback, PackMode mode) {
  constexpr int kStates = own_states(F::kKind);
  constexpr bool kFromGradient = !keeps_message(F::kKind);
  const Segment& s = segment_of(b, p);
  const bool prepared = mode != PackMode::kPayload || used_here(b, p);
  void* wire = mode == PackMode::kCommit ? nullptr : b.second;
  Buffers<T> buffers;
  alignas(64) T rounded[kChunk];
  for_picked(b, p, [&](const Stretches& picked, int64_t at) {
    const int64_t n = picked.numel();
    Elements<T> e{};
    if (kFromGradient || !prepared) {
      e.g = gather(b.gradient, b.gradient_type, picked, buffers.g);
      e.g = unscaled(b, e.g, n, buffers.g);
    }
    if (kStates > 0) e.a = gather(b.own_a, b.state_type, picked, buffers.a);
    if (kStates > 1) e.b = gather(b.own_b, b.state_type, picked, buffers.b);
    const T* x = message(b, feedback, e, n, prepared, buffers.x);
    const T* c = sends_levels(b) ? send_levels(b, s, picked, x, wire, at, rounded)
                                 : round_to_wire(b, x, n, wire, s.packed + at, rounded);
    if (mode == PackMode::kPayload || kStates == 0) return;
    T unused = 0;
#pragma GCC ivdep  // c is e.a, or overlaps neither
    for (int64_t i = 0; i < n; ++i) {
      const T sent = c[i];
      feedback.sent(sent, e.a[i], kStates > 1 ? e.b[i] : unused);
    }
    scatter(e.a, b.own_a, b.state_type, picked);
    if (kStates > 1) scatter(e.b, b.own_b, b.state_type, picked);
  });
}

inline void pack(const Bucket& b, const Piece& p, PackMode mode) {
  const Segment& s = segment_of(b, p);
  const bool sends =
      !b.bad[p.segment] && (mode == PackMode::kPayload || b.outcome[p.segment] == Outcome::kNormal);
  if (sends) {
    with_feedback(
        b, [&]<class F, class T>(const F& feedback, T) { pack_rows<F, T>(b, p, feedback, mode); });
  } else if (mode != PackMode::kCommit && p.row_begin == 0) {
    const int64_t size = size_of(b.wire_type);
    const int zero = sends_levels(b) ? most_level(b.world_size) : 0;
    std::memset(byte_offset(b.second, s.packed * size), zero,
                static_cast<size_t>(s.kept * s.cols * size));
  }
}

// What was sent of the picked rows, back into the residual.
inline void reclaim(const Bucket& b, const Piece& p) {
  with_work_type(b, [&]<class T>(T) {
    const Segment& s = segment_of(b, p);
    const bool levels = sends_levels(b);
    const T share = levels ? T(1) : static_cast<T>(share_of_sent(b));
    Buffers<T> buffers;
    for_picked(b, p, [&](const Stretches& picked, int64_t at) {
      const int64_t n = picked.numel();
      const T* sent = levels ? mean_of_levels(b, s, picked, at, buffers.g)
                             : load(b.second, b.wire_type, s.packed + at, n, buffers.g);
      T* e = gather(b.own_a, b.state_type, picked, buffers.a);
      with_type(b.state_type, [&]<class S>(S) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) {
          const T sum = e[i] + sent[i] * share;
          e[i] = is_finite(widen_to<T>(narrow_to<S>(sum))) ? sum : e[i];
        }
      });
      scatter(e, b.own_a, b.state_type, picked);
    });
  });
}

// A dense tensor into its payload. Never clamped: an infinity must arrive.
inline void copy_dense(const Bucket& b, const Piece& p) {
  with_work_type(b, [&]<class T>(T) {
    const Segment& s = segment_of(b, p);
    void* to = s.dense_in_first ? b.first : b.second;
    const DType type = s.dense_in_first ? kTypeOf<T> : b.wire_type;
    const T scale = static_cast<T>(b.wire_scale);
    Buffers<T> buffers;
    for_chunks(range_of(b, p), [&](int64_t i, int64_t n) {
      const T* g = load(b.gradient, b.gradient_type, i, n, buffers.g);
      if (scale != 1) {
        for (int64_t j = 0; j < n; ++j) buffers.x[j] = g[j] * scale;
        g = buffers.x;
      }
      store(g, to, type, s.packed + i - s.offset, n);
    });
  });
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
