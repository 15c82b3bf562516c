// Rows, and columns of low rank's R_i, as small integers: the codec of the uint8 wire, for every
// device. wire.h is the other types'.
//
// N ranks have the levels -h .. h each, h = floor(127 / N), and send u = level + h, a byte. The sum
// of N bytes is at most 2 h N <= 254: it cannot overflow, and is exact in any order. A row has one
// unit D on all ranks, in which its elements are rounded to levels:
//
//   first payload:   rank i's share of D, c rms(X_ij) / N; summed on its way, these are D
//   second payload:  u = clamp(round(x / D + s_i), -h, h) + h; summed on its way
//   C_i = D (u - h), which leaves the state, and C = D / N (sum of u - N h)
//
// c is the uniform step that suits so many levels best where x / rms is N(0, 1). The thresholds of
// the ranks are staggered, s_i = (i + 1/2) / N - 1/2: where all have the same x, the sum of their
// levels is N x / D to within one level, as if it had been rounded once, to 2 h N + 1 levels
// (Hermite's identity). That the ranks have noise of their own does as much; where they have little
// of it, as with many ranks, the errors would add up else.
//
// A column of low rank's R_i is a row to it, but for its D, which directions.h makes: no rank has
// an R_i when the first payload is sent.
#pragma once

#include <cmath>
#include <limits>

#include "base/numbers.h"
#include "kernels/kernels.h"

namespace arc_topk {

constexpr int kMostRanksOfLevels = 32;

// h. (L = floor(255 / N) + 1 levels, one less where that is even: zero is a level.)
constexpr int most_level(int world_size) { return 127 / world_size; }

// c, for 1 to 32 ranks: of the levels -h .. h the step of least mean squared error for N(0, 1).
// Constants, for no two libraries' erfc need agree; test_levels.py finds each by minimising.
constexpr double kBestStep[kMostRanksOfLevels] = {
    0.030870, 0.057261, 0.081366, 0.105488, 0.126522, 0.146404, 0.166377, 0.193249,
    0.204418, 0.231531, 0.248234, 0.267763, 0.290931, 0.290931, 0.318903, 0.353411,
    0.353411, 0.353411, 0.397159, 0.397159, 0.397159, 0.454623, 0.454623, 0.454623,
    0.454623, 0.533822, 0.533822, 0.533822, 0.533822, 0.533822, 0.533822, 0.650770};

// A, for 1 to 32 ranks: the levels of a column reach so many of its root mean squares; too wide a D
// costs less than one that cuts off. min(7, 1.05 log2(2 h + 1) + 0.4), by trials; constants as
// above.
constexpr double kReach[kMostRanksOfLevels] = {
    7.000000, 7.000000, 7.000000, 6.676144, 6.356047, 6.097578, 5.869926, 5.601906,
    5.500880, 5.276049, 5.149740, 5.011933, 4.860324, 4.860324, 4.691836, 4.502235,
    4.502235, 4.502235, 4.285462, 4.285462, 4.285462, 4.032403, 4.032403, 4.032403,
    4.032403, 3.728421, 3.728421, 3.728421, 3.728421, 3.728421, 3.728421, 3.347723};

ARC_TOPK_HD bool sends_levels(const Bucket& b) { return b.wire_type == DType::kU8; }

// Made on the host, once a kernel.
template <class T>
struct Levels {
  bool used;  // this is the bucket's wire
  T most;     // h
  T zeros;    // N h, the sum of what zeros are sent as
  T ranks;    // N
  T largest_unit;
  T stagger;     // s_i
  double step;   // c / N
  double reach;  // A

  explicit Levels(const Bucket& b)
      : used(sends_levels(b)),
        most(static_cast<T>(most_level(b.world_size))),
        zeros(static_cast<T>(b.world_size) * most),
        ranks(static_cast<T>(b.world_size)),
        largest_unit(std::numeric_limits<T>::max() / (most + 1)),
        stagger(static_cast<T>((b.rank + 0.5) / b.world_size - 0.5)),
        step(used ? kBestStep[b.world_size - 1] / b.world_size : 0),
        reach(used ? kReach[b.world_size - 1] : 0) {}

  // This rank's share of a row's unit, from the sum of squares of the elements that the row has.
  // That is made in double, where no float's square is too large or too small.
  ARC_TOPK_HD T own_share(double squares, int64_t count) const {
    return static_cast<T>(step * std::sqrt(squares / static_cast<double>(count)));
  }

  // D, from the sum of all ranks' shares. Its last eight bits are zero, so that D times a level is
  // exact; where it is no normal number it is 0, by which nothing is sent; h D is finite.
  ARC_TOPK_HD T unit(T sum) const {
    if (!(sum >= std::numeric_limits<T>::min())) return T(0);
    const T held = sum < largest_unit ? sum : largest_unit;
    return numbers::number_of<T>(numbers::key_of(held) & ~numbers::Key<T>{0xFF});
  }
  ARC_TOPK_HD static T inverse(T unit) { return unit > T(0) ? T(1) / unit : T(0); }

  // The level of a finite x, ties to even, 0 of zero: adding a number whose unit in the last place
  // is 1 rounds to an integer, on every processor alike.
  ARC_TOPK_HD T level(T x, T inverse) const {
    constexpr T kRound =
        T(1.5) * static_cast<T>(int64_t{1} << (std::numeric_limits<T>::digits - 1));
    const T y = x * inverse + stagger;
    return ((y < -most ? -most : most < y ? most : y) + kRound) - kRound;
  }
  ARC_TOPK_HD uint8_t byte(T level) const {
    return static_cast<uint8_t>(static_cast<int32_t>(level + most));
  }
  // C is this times factor().
  ARC_TOPK_HD T mean_level(T sum) const { return sum - zeros; }
  ARC_TOPK_HD T factor(T unit) const { return unit / ranks; }
};

}  // namespace arc_topk
