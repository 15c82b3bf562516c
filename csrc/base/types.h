// Types of numbers, by name; numbers.h has their bits.
#pragma once

#include <cstdint>

namespace arc_topk {

// kU8 is a wire alone: small integers, see kernels/levels.h.
enum class DType : uint8_t { kF32, kF64, kBF16, kF16, kU8 };

constexpr int64_t size_of(DType type) {
  return type == DType::kF64 ? 8 : type == DType::kF32 ? 4 : type == DType::kU8 ? 1 : 2;
}

// The type sums, sketches and scores are made in.
constexpr DType work_type(DType gradient) {
  return gradient == DType::kF64 ? DType::kF64 : DType::kF32;
}

}  // namespace arc_topk
