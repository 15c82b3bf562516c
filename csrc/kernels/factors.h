// Low rank: where the factors of a segment lie, and what the numbers in them must be alike on every
// device.
#pragma once

#include <cmath>

#include "base/portable.h"
#include "kernels/kernels.h"

namespace arc_topk {

// Whether there is a residual that factors are part of.
ARC_TOPK_HD bool remembers(const Bucket& b) { return b.factors.right != nullptr; }

ARC_TOPK_HD const FactorPlace& place_of(const Bucket& b, const Segment& s) {
  return b.factors.places[&s - b.segments];
}
template <class T>
ARC_TOPK_HD T* left_of(const Bucket& b, const Segment& s) {
  return static_cast<T*>(b.factors.left) + place_of(b, s).left;
}
template <class T>
ARC_TOPK_HD T* right_of(const Bucket& b, const Segment& s) {
  return static_cast<T*>(b.factors.right) + place_of(b, s).right;
}
ARC_TOPK_HD float* basis_of(const Bucket& b, const Segment& s) {
  return b.factors.basis + place_of(b, s).right;
}
// The sums of a strip; of the first one, after apply(), R.
template <class T>
ARC_TOPK_HD T* partial_of(const Bucket& b, const Segment& s, int64_t strip) {
  return static_cast<T*>(b.factors.partial) + place_of(b, s).partial +
         strip * s.kept * factor_stride(s.cols);
}

// On an uint8 wire a number a column of R, behind P: D.
template <class T>
ARC_TOPK_HD T* units_of(const Bucket& b, const Segment& s) {
  return static_cast<T*>(b.first) + s.units(s.kept);
}

// --- columns of unit norm ------------------------------------------------------------------------

// A sum over a column is made of sums over so many of its elements, one after the other.
constexpr int64_t kSumChunk = 256;

// A power of two that brings numbers of which the largest has this modulus to about 1, so that no
// square of theirs overflows or is lost. 0 where there are none, or one is not finite.
ARC_TOPK_HD double scale_to_one(double largest) {
  if (!(largest > 0) || largest > 1.7976931348623157e308) return 0;
  const int up = -std::ilogb(largest);
  return std::ldexp(1.0, up < 1000 ? up : 1000);
}

// What is left of a column, of its length, below which it is nothing but rounding of T.
template <class T>
constexpr double kNothingLeft = sizeof(T) == 8 ? 0x1p-40 : 0x1p-20;
// One pass of Gram-Schmidt leaves columns orthogonal to double's rounding, divided by what is left
// of them: enough for float. Twice is enough for anything.
template <class T>
constexpr int kPasses = sizeof(T) == 8 ? 2 : 1;

}  // namespace arc_topk
