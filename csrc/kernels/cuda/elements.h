// Elements in and out of memory, 16 bytes at a time wherever they lie so. All arrays of a bucket
// are cut into vectors at the same element indices; what a row or tensor leaves of a vector at its
// ends is read and written element by element.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "kernels/cuda/block.h"
#include "kernels/dispatch.h"

namespace arc_topk::cuda {

using numbers::BF16;
using numbers::F16;
using numbers::is_finite;
using numbers::Key;
using numbers::key_of;
using numbers::key_of_score;
using numbers::kTypeOf;
using numbers::narrow_to;
using numbers::number_of;
using numbers::widen_to;

template <class T>
ARC_TOPK_HD T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
ARC_TOPK_HD T larger(T a, T b) {
  return a < b ? b : a;
}
ARC_TOPK_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of a vector for a work type, where types are only known when the kernel runs.
template <class T>
constexpr int kVectorOf = 16 / sizeof(T);

// Elements [index + first, index + last) of an array: a vector of kVector, or what belongs to us of
// it.
struct Run {
  int64_t index;
  int first;
  int last;

  ARC_TOPK_DEVICE bool has(int j) const { return j >= first && j < last; }
  // Those of them that lie before element `end`.
  ARC_TOPK_DEVICE Run before(int64_t end) const {
    return {index, first,
            static_cast<int>(larger<int64_t>(smaller<int64_t>(end - index, last), 0))};
  }
  // The same elements where they lie in another array.
  ARC_TOPK_DEVICE Run moved(int64_t by) const { return {index + by, first, last}; }
  template <int kVector>
  ARC_TOPK_DEVICE bool is_vector() const {
    return first == 0 && last == kVector && index % kVector == 0;
  }
};

// Vector number `i` of the elements [begin, end), counted from the one that `begin` lies in.
template <int kVector>
ARC_TOPK_DEVICE Run run_of(int64_t begin, int64_t end, int64_t i) {
  const int64_t index = (begin / kVector + i) * kVector;
  const int64_t first = larger<int64_t>(begin - index, 0);
  const int64_t last = smaller<int64_t>(end - index, kVector);
  return {index, static_cast<int>(first), static_cast<int>(larger<int64_t>(last, 0))};
}
// How many vectors those are.
template <int kVector>
ARC_TOPK_DEVICE int64_t runs_of(int64_t begin, int64_t end) {
  return end <= begin ? 0 : (end - 1) / kVector - begin / kVector + 1;
}

// A block's threads over the vectors of [begin, end): f(run).
template <int kVector, class Block, class F>
ARC_TOPK_DEVICE void for_runs(Block& block, int64_t begin, int64_t end, const F& f) {
  const int64_t runs = runs_of<kVector>(begin, end);
  block.each([&](int t) {
    for (int64_t i = t; i < runs; i += Block::kThreads) f(run_of<kVector>(begin, end, i));
  });
}

template <int kBytes>
ARC_TOPK_DEVICE void copy_aligned(void* to, const void* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes % 16 == 0) {
    ARC_TOPK_UNROLL
    for (int i = 0; i < kBytes / 16; ++i) {
      static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
    }
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
  } else if constexpr (kBytes == 4) {
    *static_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from);
  } else {
    using Bits = std::conditional_t<kBytes == 2, uint16_t, uint8_t>;
    static_assert(kBytes == sizeof(Bits));
    *static_cast<Bits*>(to) = *static_cast<const Bits*>(from);
  }
#else
  // As strict as a GPU: a test that gets here with an odd address must fail.
  constexpr uintptr_t kAlign = kBytes % 16 == 0 ? 16 : kBytes;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % kAlign != 0) {
    throw std::logic_error("misaligned address");
  }
  std::memcpy(to, from, kBytes);
#endif
}

// An array of elements of type S.
template <class S>
struct Array {
  S* base;

  ARC_TOPK_DEVICE Array(void* at, DType) : base(static_cast<S*>(at)) {}

  // Zeros for what is not of the run.
  template <class T, int kVector>
  ARC_TOPK_DEVICE void load(Run run, T (&x)[kVector]) const {
    const S* from = base + run.index;
    if (run.is_vector<kVector>()) {
      alignas(16) S raw[kVector];
      copy_aligned<kVector * sizeof(S)>(raw, from);
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) x[j] = widen_to<T>(raw[j]);
    } else {
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) {
        S raw{};
        if (run.has(j)) copy_aligned<sizeof(S)>(&raw, from + j);
        x[j] = widen_to<T>(raw);
      }
    }
  }
  template <class T, int kVector>
  ARC_TOPK_DEVICE void store(Run run, const T (&x)[kVector]) const {
    S* to = base + run.index;
    if (run.is_vector<kVector>()) {
      alignas(16) S raw[kVector];
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) raw[j] = narrow_to<S>(x[j]);
      copy_aligned<kVector * sizeof(S)>(to, raw);
    } else {
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) {
        if (!run.has(j)) continue;
        const S raw = narrow_to<S>(x[j]);
        copy_aligned<sizeof(S)>(to + j, &raw);
      }
    }
  }
  // x as it is after having been stored.
  template <class T>
  ARC_TOPK_DEVICE T rounded(T x) const {
    return widen_to<T>(narrow_to<S>(x));
  }
};

// The same where the type is only known when the kernel runs.
struct AnyType {};
template <>
struct Array<AnyType> {
  void* base;
  DType type;

  ARC_TOPK_DEVICE Array(void* at, DType its_type) : base(at), type(its_type) {}

  template <class T, int kVector>
  ARC_TOPK_DEVICE void load(Run run, T (&x)[kVector]) const {
    with_type(type, [&]<class S>(S) { Array<S>(base, type).load(run, x); });
  }
  template <class T, int kVector>
  ARC_TOPK_DEVICE void store(Run run, const T (&x)[kVector]) const {
    with_type(type, [&]<class S>(S) { Array<S>(base, type).store(run, x); });
  }
  template <class T>
  ARC_TOPK_DEVICE T rounded(T x) const {
    with_type(type, [&]<class S>(S) { x = widen_to<T>(narrow_to<S>(x)); });
    return x;
  }
};

// Element i of an array in a gathered message, which need not be aligned to more than two bytes.
template <class S>
ARC_TOPK_DEVICE S read_unaligned(const void* base, int64_t i) {
  const auto* from = static_cast<const S*>(base) + i;
  if (reinterpret_cast<uintptr_t>(from) % sizeof(S) == 0) return *from;
  constexpr int kHalves = sizeof(S) / 2;
  const auto* halves = reinterpret_cast<const uint16_t*>(reinterpret_cast<uintptr_t>(from));
  uint16_t raw[kHalves];
  for (int j = 0; j < kHalves; ++j) raw[j] = halves[j];
  S x;
  memcpy(&x, raw, sizeof(S));
  return x;
}

ARC_TOPK_DEVICE void* byte_offset(void* base, int64_t bytes) {
  return static_cast<char*>(base) + bytes;
}
ARC_TOPK_DEVICE const void* byte_offset(const void* base, int64_t bytes) {
  return static_cast<const char*>(base) + bytes;
}

}  // namespace arc_topk::cuda
