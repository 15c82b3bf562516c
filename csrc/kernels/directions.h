// Low rank's first payload on an uint8 wire, for every device. levels.h is the second one's codec.
//
// No unit for P_i = X_i W can be agreed upon before it is sent, and none is needed: P^ is an
// orthonormal basis, to which the length of no column of P matters. So each rank sends its own
// columns at unit norm, in a unit that all know beforehand, and beside them how long they were. The
// sum of directions weighs all ranks alike, whatever the size of their gradients, and a gradient
// that grows a hundredfold from one step to the next is cut off nowhere. A rank that has not used
// the tensor, and has nothing but a residual, does not say where to look.
//
//   flags, two bytes a matrix: used, bad
//   of each matrix: k columns of m directions u = clamp(round(x / (D ||x||)), -h, h) + h
//                   k columns of N norms, two bytes each: zero but for this rank's own
//
// All is summed on its way as bytes: directions to the sum of levels (never above 255, levels.h),
// norms to those of all ranks, each in its place. They make the unit of R's column.
//
// A matrix of one row has no directions: its P^ is 1, R_i is the row itself, and its norm that of
// the row.
#pragma once

#include "kernels/factors.h"
#include "kernels/levels.h"

namespace arc_topk {

constexpr int64_t kNormBytes = 2;
constexpr int64_t direction_rows(int64_t rows) { return rows == 1 ? 0 : rows; }

ARC_TOPK_HD bool sends_directions(const Bucket& b) { return b.directions != nullptr; }

// Column c of the directions.
ARC_TOPK_HD uint8_t* directions_of(const Bucket& b, const Segment& s, int64_t c) {
  return b.directions + place_of(b, s).bytes + c * direction_rows(s.rows);
}
// Of column c: two bytes a rank.
ARC_TOPK_HD uint8_t* norms_of(const Bucket& b, const Segment& s, int64_t c) {
  return b.directions + place_of(b, s).bytes + s.kept * direction_rows(s.rows) +
         c * kNormBytes * b.world_size;
}

// --- norms ---------------------------------------------------------------------------------------

// The first two bytes of the number: sign, exponent and seven digits (of double four).
template <class T>
ARC_TOPK_HD void write_norms(T own, int rank, int world_size, uint8_t* to) {
  for (int64_t i = 0; i < kNormBytes * world_size; ++i) to[i] = 0;
  const auto bits = static_cast<uint32_t>(numbers::key_of(own) >> (8 * sizeof(T) - 16));
  to[kNormBytes * rank] = static_cast<uint8_t>(bits >> 8);
  to[kNormBytes * rank + 1] = static_cast<uint8_t>(bits & 0xFF);
}

// Of a column, over the ranks that have one: others have nothing to send.
struct Norms {
  double mean;
  int ranks;
};
template <class T>
ARC_TOPK_HD Norms read_norms(const uint8_t* from, int world_size) {
  double sum = 0;
  int ranks = 0;
  for (int rank = 0; rank < world_size; ++rank) {
    const uint32_t bits = uint32_t{from[kNormBytes * rank]} << 8 | from[kNormBytes * rank + 1];
    const T norm =
        numbers::number_of<T>(static_cast<numbers::Key<T>>(bits) << (8 * sizeof(T) - 16));
    sum += static_cast<double>(norm);
    ranks += norm > 0 ? 1 : 0;
  }
  return {ranks > 0 ? sum / ranks : 0, ranks};
}

// --- directions ----------------------------------------------------------------------------------

// D: levels reach A root mean squares of a column of m at unit norm, or as far as one element can.
template <class T>
ARC_TOPK_HD double direction_step(const Levels<T>& levels, int64_t m) {
  const double rms = 1 / std::sqrt(static_cast<double>(m));
  const double reach = levels.reach * rms < 1 ? levels.reach * rms : 1.0;
  return reach / static_cast<double>(levels.most);
}

// How long a column is, from its sum of squares: one that has overflowed counts as zero.
template <class T>
ARC_TOPK_HD T norm_of(double squares) {
  const T norm = static_cast<T>(std::sqrt(squares));
  return numbers::is_finite(norm) ? norm : T(0);
}

// What to multiply the elements of a column of P_i with, to have levels.
template <class T>
ARC_TOPK_HD T inverse_of_direction(const Levels<T>& levels, T norm, int64_t m) {
  const T unit = static_cast<T>(static_cast<double>(norm) * direction_step(levels, m));
  return unit >= std::numeric_limits<T>::min() ? T(1) / unit : T(0);
}
template <class T>
ARC_TOPK_HD uint8_t byte_of_direction(const Levels<T>& levels, T x, T inverse) {
  return levels.byte(levels.level(numbers::is_finite(x) ? x : T(0), inverse));
}

// D of a column of R_i = X_i^T P^, from the squares of P's, a sum of levels. Along w, R_i's column
// is as long as the mean one of P is, ||P_c||. Beside it the ranks have noise of their own, of some
// variance v an element: ||P_i,c||^2 is about ||P_c||^2 + (1 - 1/N) m v, and ||R_i,c||^2 about
// ||P_c||^2 + n v.
template <class T>
ARC_TOPK_HD T unit_of_column(const Levels<T>& levels, const Norms& norms, double squares, int64_t m,
                             int64_t n) {
  const double count = norms.ranks > 1 ? norms.ranks : 1;
  const double step = direction_step(levels, m) / count;
  const double every = norms.mean * norms.mean;
  const double shared = every * (squares * step * step);
  const bool noisy = norms.ranks > 1 && every > shared;
  const double noise = noisy ? (every - shared) / (1 - 1 / count) : 0;
  const double square = shared / static_cast<double>(n) + noise / static_cast<double>(m);
  const double rms = levels.reach / static_cast<double>(levels.most) * std::sqrt(square);
  return levels.unit(static_cast<T>(rms));
}
// Of a matrix of one row: a row's, whose root mean square is known.
template <class T>
ARC_TOPK_HD T unit_of_row(const Levels<T>& levels, const Norms& norms, int64_t n) {
  const double rms = norms.mean / std::sqrt(static_cast<double>(n));
  return levels.unit(static_cast<T>(levels.step * static_cast<double>(levels.ranks) * rms));
}

}  // namespace arc_topk
