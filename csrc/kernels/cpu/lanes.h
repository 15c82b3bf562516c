// Sixteen floats or eight doubles that are multiplied and added lane by lane: one, two or four
// registers of the instruction set compiled for. The number of lanes, and so the order in which a
// sum is made, is the same for all of them; products are rounded before they are added. All give
// the same bits.
#pragma once

#include "kernels/cpu/convert.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class T>
struct Lanes {
  typedef T Register __attribute__((vector_size(kRegisterBytes)));
  static constexpr int kWidth = 64 / sizeof(T);
  static constexpr int kRegisters = 64 / kRegisterBytes;
  static constexpr int kInRegister = kRegisterBytes / sizeof(T);

  Register part[kRegisters];
};

template <class T>
[[gnu::always_inline]] inline Lanes<T> zero_lanes() {
  return Lanes<T>{};
}

template <class T>
[[gnu::always_inline]] inline Lanes<T> load_lanes(const T* from) {
  Lanes<T> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <class T, class S>
[[gnu::always_inline]] inline Lanes<T> load_lanes_as(const S* from) {
  if constexpr (std::is_same_v<T, S>) {
    return load_lanes(from);
  } else {
    T wide[Lanes<T>::kWidth];
    for (int i = 0; i < Lanes<T>::kWidth; ++i) wide[i] = from[i];
    return load_lanes(wide);
  }
}

// n < kWidth elements, zeros behind them.
template <class T, class S>
[[gnu::always_inline]] inline Lanes<T> load_some_lanes_as(const S* from, int64_t n) {
  T padded[Lanes<T>::kWidth] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = from[i];
  return load_lanes(padded);
}

template <class T>
[[gnu::always_inline]] inline void add_product(Lanes<T>& sum, const Lanes<T>& x,
                                               const Lanes<T>& y) {
  for (int i = 0; i < Lanes<T>::kRegisters; ++i) sum.part[i] = sum.part[i] + x.part[i] * y.part[i];
}

// The sum of all lanes: the upper half onto the lower, until one is left.
template <class T>
[[gnu::always_inline]] inline T sum_lanes(const Lanes<T>& x) {
  T lane[Lanes<T>::kWidth];
  std::memcpy(lane, &x, sizeof(x));
  for (int half = Lanes<T>::kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
