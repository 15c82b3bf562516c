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

// Halves within halves down to a register, rather than an array of registers: arrays are taken
// apart only where the compiler unrolls every loop over them early enough, and live in memory
// otherwise.
template <class T, int kBytes>
struct Wide {
  using Half = Wide<T, kBytes / 2>;
  Half low;
  Half high;

  [[gnu::always_inline]] static Wide load(const T* from) {
    return {Half::load(from), Half::load(from + kBytes / 2 / sizeof(T))};
  }
  [[gnu::always_inline]] void add_product(const Wide& x, const Wide& y) {
    low.add_product(x.low, y.low);
    high.add_product(x.high, y.high);
  }
  [[gnu::always_inline]] void add(const Wide& x) {
    low.add(x.low);
    high.add(x.high);
  }
};

template <class T>
struct Wide<T, kRegisterBytes> {
  typedef T Register __attribute__((vector_size(kRegisterBytes)));
  Register lanes;

  [[gnu::always_inline]] static Wide load(const T* from) {
    Wide x;
    std::memcpy(&x.lanes, from, kRegisterBytes);
    return x;
  }
  [[gnu::always_inline]] void add_product(const Wide& x, const Wide& y) {
    lanes = lanes + x.lanes * y.lanes;
  }
  [[gnu::always_inline]] void add(const Wide& x) { lanes = lanes + x.lanes; }
};

template <class T>
struct Lanes : Wide<T, 64> {
  static constexpr int kWidth = 64 / sizeof(T);
};

template <class T, class S>
[[gnu::always_inline]] inline Lanes<T> load_lanes(const S* from) {
  if constexpr (std::is_same_v<T, S>) {
    return {Wide<T, 64>::load(from)};
  } else {
    T wide[Lanes<T>::kWidth];
    for (int i = 0; i < Lanes<T>::kWidth; ++i) wide[i] = from[i];
    return {Wide<T, 64>::load(wide)};
  }
}

// A call of its own: in the many places that end a row with it, it would be most of the code.
template <class T, class S>
[[gnu::noinline]] inline void copy_some(const S* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// n < kWidth elements, zeros behind them.
template <class T, class S>
[[gnu::always_inline]] inline Lanes<T> load_some_lanes(const S* from, int64_t n) {
  T padded[Lanes<T>::kWidth] = {};
  copy_some(from, n, padded);
  return load_lanes<T>(padded);
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

// sum_lanes() of four at once, in the same order: halves are added until four lanes are left, then
// the four of them side by side.
[[gnu::always_inline]] inline void sum_lanes_of_four(const Lanes<float>* x, float* sums) {
  typedef float Four __attribute__((vector_size(16)));
  const auto fold = [](const Lanes<float>& lanes, Four& four) {
    Four part[4];
    std::memcpy(part, &lanes, sizeof(lanes));
    four = (part[0] + part[2]) + (part[1] + part[3]);
  };
  Four a, b, c, d;
  fold(x[0], a);
  fold(x[1], b);
  fold(x[2], c);
  fold(x[3], d);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) +  // a0 + a2, b0 + b2,
                  __builtin_shufflevector(a, b, 2, 6, 3, 7);   // a1 + a3, b1 + b3
  const Four cd =
      __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Four all =
      __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  std::memcpy(sums, &all, sizeof(all));
}
[[gnu::always_inline]] inline void sum_lanes_of_four(const Lanes<double>* x, double* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = sum_lanes(x[i]);
}

// Of a run that comes in parts, in double. Parts begin at multiples of four times the lanes'
// number: one sum alone would wait for itself in every addition.
template <class T>
class SumOfSquares {
 public:
  void add(const T* x, int64_t n) {
    constexpr int64_t kWidth = Lanes<double>::kWidth;
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
      add_lanes(x + i, a_);
      add_lanes(x + i + kWidth, b_);
      add_lanes(x + i + 2 * kWidth, c_);
      add_lanes(x + i + 3 * kWidth, d_);
    }
    for (; i + kWidth <= n; i += kWidth) add_lanes(x + i, a_);
    const auto xs = load_some_lanes<double>(x + i, n - i);
    a_.add_product(xs, xs);
  }
  double value() const {
    Lanes<double> ab = a_, cd = c_;
    ab.add(b_);
    cd.add(d_);
    ab.add(cd);
    return sum_lanes(ab);
  }

 private:
  [[gnu::always_inline]] static void add_lanes(const T* x, Lanes<double>& to) {
    const auto xs = load_lanes<double>(x);
    to.add_product(xs, xs);
  }

  Lanes<double> a_{}, b_{}, c_{}, d_{};
};

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
