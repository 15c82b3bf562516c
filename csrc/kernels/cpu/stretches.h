// The picked rows of a piece, as they lie in the bucket's arrays and in the payload.
#pragma once

#include "kernels/cpu/prepare.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// Element i of an array that need not be aligned, as in a gathered message.
template <class S>
inline S read(const void* base, int64_t i) {
  S x;
  std::memcpy(&x, static_cast<const char*>(base) + i * static_cast<int64_t>(sizeof(S)), sizeof(S));
  return x;
}

// The first of `count` ascending picks that is not below `row`.
inline int64_t first_pick(const void* picks, int64_t count, int64_t row) {
  int64_t at = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (read<int32_t>(picks, at + half) < row) {
      at += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return at;
}

// Equal stretches of an array that lie apart: selected rows, or parts of them. Those that go beyond
// `end` are cut off there and count as zero behind.
struct Stretches {
  int64_t origin;
  const int32_t* picks;
  int64_t count;
  int64_t stride;
  int64_t length;
  int64_t end;

  int64_t start(int64_t k) const { return origin + picks[k] * stride; }
  int64_t valid(int64_t k) const { return std::clamp<int64_t>(end - start(k), 0, length); }
  int64_t numel() const { return count * length; }
};

// Calls f(stretches, at) for the picks of a piece, kChunk elements or fewer at a time; `at` is
// where they begin among the segment's packed rows.
template <class F>
inline void for_picked(const Bucket& b, const Piece& p, F&& f) {
  const Segment& s = segment_of(b, p);
  const int32_t* picks = b.picks + s.pick;
  const int64_t begin = first_pick(picks, s.kept, p.row_begin);
  const int64_t end = first_pick(picks, s.kept, p.row_end);
  const int64_t rows = std::max<int64_t>(1, kChunk / s.cols);
  for (int64_t k = begin; k < end; k += rows) {
    Stretches x{s.offset, picks + k, std::min(rows, end - k), s.cols, s.cols, s.offset + s.numel};
    for (int64_t column = 0; column < s.cols; column += kChunk) {
      x.origin = s.offset + column;
      x.length = std::min(kChunk, s.cols - column);
      f(x, k * s.cols + column);
    }
  }
}

// The stretches one after the other as T. As in load(), where they lie if that is possible.
template <class T>
inline T* gather(void* base, DType type, const Stretches& x, T* buffer) {
  if (x.count == 1 && x.valid(0) == x.length) return load(base, type, x.start(0), x.length, buffer);
  with_type(type, [&]<class S>(S) {
    const S* from = static_cast<const S*>(base);
    if (x.stride == 1) {
      for (int64_t k = 0; k < x.count; ++k) buffer[k] = widen_to<T>(from[x.start(k)]);
      return;
    }
    for (int64_t k = 0; k < x.count; ++k) {
      T* to = buffer + k * x.length;
      const int64_t valid = x.valid(k);
      widen_run(from + x.start(k), valid, to);
      std::fill(to + valid, to + x.length, T(0));
    }
  });
  return buffer;
}

template <class T>
inline void scatter(const T* from, void* base, DType type, const Stretches& x) {
  if (x.count == 1) return store(from, base, type, x.start(0), x.valid(0));
  with_type(type, [&]<class S>(S) {
    S* to = static_cast<S*>(base);
    if (x.stride == 1) {
      for (int64_t k = 0; k < x.count; ++k) to[x.start(k)] = narrow_to<S>(from[k]);
      return;
    }
    for (int64_t k = 0; k < x.count; ++k) {
      narrow_run(from + k * x.length, x.valid(k), to + x.start(k));
    }
  });
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
