// Number types bit by bit: the same conversions, and so the same bits, on the host and in a CUDA
// thread. Rounds to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <type_traits>

#include "base/portable.h"
#include "base/types.h"

#if !defined(__CUDA_ARCH__)
#include <bit>
#endif

namespace arc_topk::numbers {

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
                          : std::is_same_v<T, F16>    ? DType::kF16
                                                      : DType::kU8;

#if defined(__CUDA_ARCH__)
ARC_TOPK_HD uint32_t bits_of(float x) { return __float_as_uint(x); }
ARC_TOPK_HD uint64_t bits_of(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
ARC_TOPK_HD float float_of(uint32_t bits) { return __uint_as_float(bits); }
#else
ARC_TOPK_HD uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
ARC_TOPK_HD uint64_t bits_of(double x) { return std::bit_cast<uint64_t>(x); }
ARC_TOPK_HD float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
#endif

ARC_TOPK_HD float widen(BF16 x) { return float_of(uint32_t{x.bits} << 16); }

ARC_TOPK_HD BF16 to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded)};
}

ARC_TOPK_HD float widen(F16 x) {
  const uint32_t rest = uint32_t{x.bits & 0x7FFFu} << 13;
  const uint32_t normal = rest + ((127u - 15u) << 23);
  // Without an exponent: the float with that mantissa and the smallest exponent, less its hidden
  // one.
  const uint32_t small = bits_of(float_of(rest + (113u << 23)) - float_of(113u << 23));
  const uint32_t special = (rest | 0x7F800000u) | (rest & 0x007FFFFFu ? 0x00400000u : 0u);
  const uint32_t exponent = rest & (0x1Fu << 23);
  const uint32_t magnitude = exponent == 0 ? small : exponent == (0x1Fu << 23) ? special : normal;
  return float_of(magnitude | (uint32_t{x.bits & 0x8000u} << 16));
}

ARC_TOPK_HD F16 to_f16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rest = bits & 0x7FFFFFFFu;
  const uint32_t normal = (rest - ((127u - 15u) << 23) + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
  // Below the smallest normal number: an addition whose unit in the last place is fp16's smallest
  // step does the rounding.
  constexpr uint32_t kHalf = 126u << 23;
  const uint32_t small = bits_of(float_of(rest) + float_of(kHalf)) - kHalf;
  const uint32_t special = rest > 0x7F800000u ? 0x7E00u | ((rest >> 13) & 0x3FFu) : 0x7C00u;
  const uint32_t magnitude = rest < (113u << 23) ? small : rest >= (143u << 23) ? special : normal;
  return {static_cast<uint16_t>(magnitude | ((bits >> 16) & 0x8000u))};
}

template <class T, class S>
ARC_TOPK_HD T widen_to(S x) {
  if constexpr (std::is_same_v<S, BF16> || std::is_same_v<S, F16>) {
    return static_cast<T>(widen(x));
  } else {
    return static_cast<T>(x);
  }
}

template <class S, class T>
ARC_TOPK_HD S narrow_to(T x) {
  if constexpr (std::is_same_v<S, BF16>) {
    return to_bf16(static_cast<float>(x));
  } else if constexpr (std::is_same_v<S, F16>) {
    return to_f16(static_cast<float>(x));
  } else {
    return static_cast<S>(x);
  }
}

template <class T>
using Key = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// Of numbers that are not negative, the bits as an integer have the same order.
template <class T>
ARC_TOPK_HD Key<T> key_of(T x) {
  return bits_of(x) & (~Key<T>{0} >> 1);
}

// The number that has this key and is not negative.
template <class T>
ARC_TOPK_HD T number_of(Key<T> key) {
  T x;
  memcpy(&x, &key, sizeof(T));
  return x;
}

template <class T>
ARC_TOPK_HD bool is_finite(T x) {
  return key_of(x) < (sizeof(T) == 4 ? Key<T>{0x7F800000u} : static_cast<Key<T>>(0x7FFull << 52));
}

// A row's score, the same on every machine: what has overflowed, to infinity or between two of them
// to some NaN or other, counts as the largest.
template <class T>
ARC_TOPK_HD Key<T> key_of_score(T score) {
  return key_of(is_finite(score) ? score : std::numeric_limits<T>::infinity());
}

}  // namespace arc_topk::numbers
