// Low rank's P_i as directions, to the payload of bytes and back.
#pragma once

#include "kernels/cpu/message.h"
#include "kernels/cpu/orthonormalise.h"
#include "kernels/directions.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// Of the message of a matrix of one row, which this rank has used.
template <class T>
inline double squares_of_row(const Bucket& b, const Segment& s) {
  double squares = 0;
  T buffer[kSumChunk];
  double wide[kSumChunk];
  for (int64_t j = 0; j < s.cols; j += kSumChunk) {
    const int64_t some = std::min(kSumChunk, s.cols - j);
    const T* x = remembers(b)
                     ? load(b.own_a, b.state_type, s.offset + j, some, buffer)
                     : unscaled(b, load(b.gradient, b.gradient_type, s.offset + j, some, buffer),
                                some, buffer);
    for (int64_t i = 0; i < some; ++i) wide[i] = static_cast<double>(x[i]);
    squares += dot_of_chunk(wide, wide, some);
  }
  return squares;
}

// Of a column of what lies in the first payload.
template <class T>
inline double squares_of(const Bucket& b, const Segment& s, int64_t c) {
  return squares_of_column(static_cast<const T*>(b.first) + s.sketch + c, s.rows, s.kept);
}

// From `first` into `directions`: nothing of what this rank has not used.
inline void send_directions(const Bucket& b, const Segment& s, bool used) {
  with_work_type(b, [&]<class T>(T) {
    const Levels<T> levels(b);
    const bool row = s.rows == 1;
    for (int64_t c = 0; c < s.kept; ++c) {
      const double squares = !used ? 0 : row ? squares_of_row<T>(b, s) : squares_of<T>(b, s, c);
      const T norm = norm_of<T>(squares);
      write_norms(norm, b.rank, b.world_size, norms_of(b, s, c));
      if (row) continue;
      const T inverse = inverse_of_direction(levels, norm, s.rows);
      const T* p = static_cast<const T*>(b.first) + s.sketch + c;
      uint8_t* to = directions_of(b, s, c);
      for (int64_t i = 0; i < s.rows; ++i)
        to[i] = byte_of_direction(levels, p[i * s.kept], inverse);
    }
  });
}

// The way back, of what was summed: P, in some unit of its own, and of R's columns their units.
template <class T>
inline void receive_directions(const Bucket& b, const Segment& s) {
  const Levels<T> levels(b);
  const bool row = s.rows == 1;
  for (int64_t c = 0; c < s.kept; ++c) {
    T* p = static_cast<T*>(b.first) + s.sketch + c;
    const uint8_t* sums = directions_of(b, s, c);
    for (int64_t i = 0; i < s.rows; ++i)
      p[i * s.kept] = row ? T(1) : levels.mean_level(static_cast<T>(sums[i]));
    const Norms norms = read_norms<T>(norms_of(b, s, c), b.world_size);
    units_of<T>(b, s)[c] =
        row ? unit_of_row(levels, norms, s.cols)
            : unit_of_column(levels, norms, squares_of<T>(b, s, c), s.rows, s.cols);
  }
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
