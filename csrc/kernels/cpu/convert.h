// Number types at the edges: kernels compute in float or double on short runs of elements that stay
// in the L1 cache, and convert on the way in and out. Rounds to nearest even; NaN stays NaN.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/dispatch.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

// Everything that is compiled for several instruction sets lies in a namespace named after the set:
// the linker would otherwise keep one copy of an inline function, and it might be the wrong one.
#if !defined(ARC_TOPK_ISA)
#define ARC_TOPK_ISA baseline
#endif

namespace arc_topk::cpu::ARC_TOPK_ISA {

// Elements worked on at a time. A handful of arrays of this length fit in the L1 cache.
constexpr int64_t kChunk = 1024;

// Always inlined, so that no copy of them is left for the linker to choose from.
using numbers::BF16;
using numbers::F16;
using numbers::is_finite;
using numbers::Key;
using numbers::key_of;
using numbers::key_of_score;
using numbers::kTypeOf;
using numbers::narrow_to;
using numbers::number_of;
using numbers::widen;
using numbers::widen_to;

// --- runs of elements
// -----------------------------------------------------------------------------

template <class T, class S>
inline void widen_run(const S* from, int64_t n, T* to) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, F16> && std::is_same_v<T, float>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (; i < n; ++i) to[i] = widen_to<T>(from[i]);
}

template <class S, class T>
inline void narrow_run(const T* from, int64_t n, S* to) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, F16> && std::is_same_v<T, float>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
    }
  }
#endif
  for (; i < n; ++i) to[i] = narrow_to<S>(from[i]);
}

inline void* byte_offset(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }
inline const void* byte_offset(const void* base, int64_t bytes) {
  return static_cast<const char*>(base) + bytes;
}

// Elements [begin, begin + n) of an array as T: where they lie if they are T there already, else in
// `buffer`, converted.
template <class T>
inline T* load(void* base, DType type, int64_t begin, int64_t n, T* buffer) {
  if (type == kTypeOf<T>) return static_cast<T*>(base) + begin;
  with_type(type, [&]<class S>(S) { widen_run(static_cast<const S*>(base) + begin, n, buffer); });
  return buffer;
}

// The way back. Nothing to do where the elements were worked on in place.
template <class T>
inline void store(const T* from, void* base, DType type, int64_t begin, int64_t n) {
  if (type == kTypeOf<T>) {
    T* to = static_cast<T*>(base) + begin;
    if (to != from) std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  with_type(type, [&]<class S>(S) { narrow_run(from, n, static_cast<S*>(base) + begin); });
}

// x as it is after having been stored.
template <class T>
inline T rounded_to(DType type, T x) {
  return with_type(type, [&]<class S>(S) { return widen_to<T>(narrow_to<S>(x)); });
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
