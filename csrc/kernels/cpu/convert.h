// Number types at the edges: kernels compute in float or double on short runs of elements that stay
// in the L1 cache, and convert on the way in and out. Rounds to nearest even; NaN stays NaN.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>

#include "kernels/kernels.h"

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

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class T>
constexpr DType kTypeOf = std::is_same_v<T, float>    ? DType::kF32
                          : std::is_same_v<T, double> ? DType::kF64
                          : std::is_same_v<T, BF16>   ? DType::kBF16
                                                      : DType::kF16;

// --- one element
// ----------------------------------------------------------------------------------

inline float widen(BF16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline BF16 to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded)};
}

inline float widen(F16 x) {
  const uint32_t rest = uint32_t{x.bits & 0x7FFFu} << 13;
  const uint32_t normal = rest + ((127u - 15u) << 23);
  // Without an exponent: the float with that mantissa and the smallest exponent, less its hidden
  // one.
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(rest + (113u << 23)) -
                                                 std::bit_cast<float>(113u << 23));
  const uint32_t special = (rest | 0x7F800000u) | (rest & 0x007FFFFFu ? 0x00400000u : 0u);
  const uint32_t exponent = rest & (0x1Fu << 23);
  const uint32_t magnitude = exponent == 0 ? small : exponent == (0x1Fu << 23) ? special : normal;
  return std::bit_cast<float>(magnitude | (uint32_t{x.bits & 0x8000u} << 16));
}

inline F16 to_f16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rest = bits & 0x7FFFFFFFu;
  const uint32_t normal = (rest - ((127u - 15u) << 23) + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
  // Below the smallest normal number: an addition whose unit in the last place is fp16's smallest
  // step does the rounding.
  constexpr uint32_t kHalf = 126u << 23;
  const uint32_t small =
      std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + std::bit_cast<float>(kHalf)) - kHalf;
  const uint32_t special = rest > 0x7F800000u ? 0x7E00u | ((rest >> 13) & 0x3FFu) : 0x7C00u;
  const uint32_t magnitude = rest < (113u << 23) ? small : rest >= (143u << 23) ? special : normal;
  return {static_cast<uint16_t>(magnitude | ((bits >> 16) & 0x8000u))};
}

template <class T>
inline T widen_to(float x) {
  return static_cast<T>(x);
}
template <class T>
inline T widen_to(double x) {
  return static_cast<T>(x);
}
template <class T>
inline T widen_to(BF16 x) {
  return static_cast<T>(widen(x));
}
template <class T>
inline T widen_to(F16 x) {
  return static_cast<T>(widen(x));
}

template <class S, class T>
inline S narrow_to(T x) {
  if constexpr (std::is_same_v<S, BF16>) {
    return to_bf16(static_cast<float>(x));
  } else if constexpr (std::is_same_v<S, F16>) {
    return to_f16(static_cast<float>(x));
  } else {
    return static_cast<S>(x);
  }
}

// --- runs of elements
// -----------------------------------------------------------------------------

// Calls f with an element of the C++ type that `type` stands for.
template <class F>
inline decltype(auto) with_type(DType type, F&& f) {
  switch (type) {
    case DType::kF64:
      return f(double{});
    case DType::kBF16:
      return f(BF16{});
    case DType::kF16:
      return f(F16{});
    case DType::kF32:
      break;
  }
  return f(float{});
}

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

template <class T>
inline bool is_finite(T x) {
  if constexpr (sizeof(T) == 4) {
    return (std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu) < 0x7F800000u;
  } else {
    return (std::bit_cast<uint64_t>(x) & ~(uint64_t{1} << 63)) < (uint64_t{0x7FF} << 52);
  }
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
