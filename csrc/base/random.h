// Random numbers by counter: any element of any step can be made alone, in any order, by any thread
// or device, and is the same bits everywhere. Philox4x32-10 of Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//
// The normal numbers take no libm and no fused multiply-add, both of which differ between machines:
// only correctly rounded operations in a fixed order. Loops over them vectorise.
#pragma once

#include <cstdint>

#include "base/portable.h"

#if !defined(__CUDA_ARCH__)
#include <bit>
#include <cmath>
#endif

namespace arc_topk {

struct Philox {
  uint32_t word[4];
};

ARC_TOPK_HD Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                          uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

namespace exact {

// nvcc fuses a * b + c unless told otherwise; host code is compiled with -ffp-contract=off.
#if defined(__CUDA_ARCH__)
ARC_TOPK_HD float add(float a, float b) { return __fadd_rn(a, b); }
ARC_TOPK_HD float mul(float a, float b) { return __fmul_rn(a, b); }
ARC_TOPK_HD float root(float a) { return __fsqrt_rn(a); }
ARC_TOPK_HD uint32_t bits(float a) { return __float_as_uint(a); }
ARC_TOPK_HD float from_bits(uint32_t a) { return __uint_as_float(a); }
#else
ARC_TOPK_HD float add(float a, float b) { return a + b; }
ARC_TOPK_HD float mul(float a, float b) { return a * b; }
ARC_TOPK_HD float root(float a) { return std::sqrt(a); }
ARC_TOPK_HD uint32_t bits(float a) { return std::bit_cast<uint32_t>(a); }
ARC_TOPK_HD float from_bits(uint32_t a) { return std::bit_cast<float>(a); }
#endif

// a * x + b, rounded twice.
ARC_TOPK_HD float step(float a, float x, float b) { return add(mul(a, x), b); }

// ln(n / 2^24) for n in [1, 2^24]. The mantissa is brought to [sqrt(1/2), sqrt(2)), so that close
// to n = 2^24 no digits cancel; polynomial of the Cephes library's logf.
ARC_TOPK_HD float log_of_24_bits(uint32_t n) {
  constexpr uint32_t kRootHalf = 0x3F3504F3u;
  const uint32_t shifted =
      bits(static_cast<float>(static_cast<int32_t>(n))) + (0x3F800000u - kRootHalf);
  const float exponent = static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127 - 24);
  const float f = add(from_bits((shifted & 0x007FFFFFu) + kRootHalf), -1.0f);
  const float z = mul(f, f);
  float p = 7.0376836292e-2f;
  p = step(p, f, -1.1514610310e-1f);
  p = step(p, f, 1.1676998740e-1f);
  p = step(p, f, -1.2420140846e-1f);
  p = step(p, f, 1.4249322787e-1f);
  p = step(p, f, -1.6668057665e-1f);
  p = step(p, f, 2.0000714765e-1f);
  p = step(p, f, -2.4999993993e-1f);
  p = step(p, f, 3.3333331174e-1f);
  p = mul(mul(p, f), z);
  p = step(-2.12194440e-4f, exponent, p);  // ln 2 in two parts, the first exact when multiplied
  p = step(-0.5f, z, p);
  return step(0.693359375f, exponent, add(f, p));
}

struct Direction {
  float cosine;
  float sine;
};

// Cosine and sine of n / 2^24 full turns. The nearest quarter turn is taken off in integers, which
// is exact; polynomials of Cephes' sinf and cosf for the rest, at most an eighth of a turn.
ARC_TOPK_HD Direction turn_of_24_bits(uint32_t n) {
  const uint32_t quarter = (n + (1u << 21)) >> 22;
  const int32_t rest = static_cast<int32_t>(n) - static_cast<int32_t>(quarter << 22);
  const float x = mul(static_cast<float>(rest), 3.7450702829238413e-7f);  // 2 pi / 2^24
  const float z = mul(x, x);
  float s = -1.9515295891e-4f;
  s = step(s, z, 8.3321608736e-3f);
  s = step(s, z, -1.6666654611e-1f);
  s = step(mul(s, z), x, x);
  float c = 2.443315711809948e-5f;
  c = step(c, z, -1.388731625493765e-3f);
  c = step(c, z, 4.166664568298827e-2f);
  c = add(step(-0.5f, z, mul(mul(c, z), z)), 1.0f);
  const bool swap = quarter & 1u;
  const uint32_t negative_cosine = ((quarter + 1u) & 2u) << 30;
  const uint32_t negative_sine = (quarter & 2u) << 30;
  return {from_bits(bits(swap ? s : c) ^ negative_cosine),
          from_bits(bits(swap ? c : s) ^ negative_sine)};
}

}  // namespace exact

struct Normals {
  float z[4];
};

// Four standard normal numbers from one block, by Box and Muller from two pairs of words.
ARC_TOPK_HD Normals normals(const Philox& block) {
  using namespace exact;
  const float radius0 = root(mul(-2.0f, log_of_24_bits((block.word[0] >> 8) + 1u)));
  const float radius1 = root(mul(-2.0f, log_of_24_bits((block.word[2] >> 8) + 1u)));
  const Direction turn0 = turn_of_24_bits(block.word[1] >> 8);
  const Direction turn1 = turn_of_24_bits(block.word[3] >> 8);
  return {{mul(radius0, turn0.cosine), mul(radius0, turn0.sine), mul(radius1, turn1.cosine),
           mul(radius1, turn1.sine)}};
}

// V's elements (row, 4 * column_group ... + 3) in one step. The constant keeps V's numbers apart
// from Rand-K's, which come from the same seed.
ARC_TOPK_HD Normals projection_normals(uint32_t row, uint32_t column_group, uint64_t seed,
                                       uint64_t step) {
  return normals(philox(row, column_group, static_cast<uint32_t>(step),
                        static_cast<uint32_t>(step >> 32), static_cast<uint32_t>(seed),
                        static_cast<uint32_t>(seed >> 32) ^ 0x41524356u));
}

// Elements 4 * row_group ... + 3 of a column of low rank's W that is drawn, of the tensor known as
// `stream`. Of a step's number the lower half tells enough.
ARC_TOPK_HD Normals basis_normals(uint32_t row_group, uint32_t column, uint32_t stream,
                                  uint64_t seed, uint64_t step) {
  return normals(philox(row_group, column, static_cast<uint32_t>(step), stream,
                        static_cast<uint32_t>(seed),
                        static_cast<uint32_t>(seed >> 32) ^ 0x41524357u));
}

// Rand-K's keys of rows 4 * row_group ... + 3 of the tensor known as `stream`.
ARC_TOPK_HD Philox selection_keys(uint32_t row_group, uint32_t stream, uint64_t seed,
                                  uint64_t step) {
  return philox(row_group, stream, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32),
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32) ^ 0x52414E4Bu);
}

}  // namespace arc_topk
