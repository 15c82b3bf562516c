// Rows, and columns of low rank, to the uint8 wire and back, a chunk of them at a time.
#pragma once

#include "kernels/cpu/stretches.h"
#include "kernels/levels.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// What arrives of x[] where D is the unit: into `sent`, its bytes into `bytes`.
template <class T>
inline void round_to_levels(const Levels<T>& levels, T unit, const T* x, int64_t n, uint8_t* bytes,
                            T* sent) {
  const T inverse = Levels<T>::inverse(unit);
#pragma GCC ivdep  // bytes may be anything's
  for (int64_t i = 0; i < n; ++i) {
    const T level = levels.level(x[i], inverse);
    bytes[i] = levels.byte(level);
    sent[i] = level * unit;
  }
}

template <class T>
inline void mean_of_bytes(const Levels<T>& levels, T unit, const uint8_t* sums, int64_t n,
                          T* mean) {
  const T factor = levels.factor(unit);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) mean[i] = levels.mean_level(static_cast<T>(sums[i])) * factor;
}

// Calls f(D, n, at) for each stretch of a chunk: its row's unit, its elements, and where they begin
// among the chunk's.
template <class T, class F>
inline void for_units(const Bucket& b, const Segment& s, const Levels<T>& levels,
                      const Stretches& picked, F&& f) {
  const T* sums = static_cast<const T*>(b.first) + s.units(b.sketch_dim);
  for (int64_t k = 0; k < picked.count; ++k) {
    f(levels.unit(sums[picked.picks[k]]), picked.length, k * picked.length);
  }
}

// What arrives of x: C_i, in `sent`. Puts its bytes at `wire`, `at` elements into the segment's,
// unless that is null.
template <class T>
inline const T* send_levels(const Bucket& b, const Segment& s, const Stretches& picked, const T* x,
                            void* wire, int64_t at, T* sent) {
  const Levels<T> levels(b);
  uint8_t unsent[kChunk];
  uint8_t* bytes = wire != nullptr ? static_cast<uint8_t*>(wire) + s.packed + at : unsent;
  for_units(b, s, levels, picked, [&](T unit, int64_t n, int64_t begin) {
    round_to_levels(levels, unit, x + begin, n, bytes + begin, sent + begin);
  });
  return sent;
}

// C, from the bytes that were summed on their way.
template <class T>
inline T* mean_of_levels(const Bucket& b, const Segment& s, const Stretches& picked, int64_t at,
                         T* mean) {
  const Levels<T> levels(b);
  const auto* sums = static_cast<const uint8_t*>(b.second) + s.packed + at;
  for_units(b, s, levels, picked, [&](T unit, int64_t n, int64_t begin) {
    mean_of_bytes(levels, unit, sums + begin, n, mean + begin);
  });
  return mean;
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
