// A block's work on a column of a factor: sums in the CPU's order, to the same bits.
#pragma once

#include "base/random.h"
#include "kernels/cuda/elements.h"
#include "kernels/factors.h"

namespace arc_topk::cuda {

// One block a column: index and number of the columns of all matrices, as if each had as many as
// the one that has the most.
struct Column {
  int64_t segment;
  int64_t c;

  ARC_TOPK_DEVICE Column(const Bucket& b, int64_t index)
      : segment(index / b.factors.most_columns), c(index % b.factors.most_columns) {}
};
inline int64_t columns_of(const Bucket& b) { return b.num_segments * b.factors.most_columns; }

// --- whose an element is -------------------------------------------------------------------------
// A warp has a chunk (kSumChunk). The CPU sums one up in four sets of eight lanes: of 32 neighbours
// each is one lane's. Here a lane is a thread, and they are numbered so that group_sums() adds
// lanes up as the CPU does, the halves of each set first. A thread touches no element but its own,
// so that it can write one here and read it there with no barrier between.

ARC_TOPK_DEVICE int place_of_lane(int lane) {
  const int set = (lane & 1) * 2 + (lane >> 1 & 1);
  return set * 8 + lane / 4;
}

template <int kCount>
struct Many {
  static constexpr int kHas = kCount;
};

// Calls f(i, Many<n>): elements i, i + 32, ... of [begin, end), a chunk, that are this lane's, in
// the order in which the CPU adds them up. kMost: at a time, for reads side by side.
template <int kMost, class F>
ARC_TOPK_DEVICE void for_lane(int64_t begin, int64_t end, int lane, const F& f) {
  const int place = place_of_lane(lane);
  const int64_t whole = begin + (end - begin) / 32 * 32;
  int64_t i = begin + place;
  for (; i + (kMost - 1) * 32 < whole; i += kMost * 32) f(i, Many<kMost>{});
  for (; i < whole; i += 32) f(i, Many<1>{});
  // Of the rest, whole eights go to the first set, what is left of one to the second.
  const int64_t eights = whole + (end - whole) / 8 * 8;
  if (place < 8) {
    for (i = whole + place; i < eights; i += 8) f(i, Many<1>{});
  } else if (place < 16 && eights + place - 8 < end) {
    f(eights + place - 8, Many<1>{});
  }
}

// Calls f(i) for the elements of a column of n that are thread t's.
template <int kThreads, class F>
ARC_TOPK_DEVICE void for_own(int64_t n, int t, const F& f) {
  for (int64_t begin = t / kWarp * kSumChunk; begin < n; begin += kThreads / kWarp * kSumChunk) {
    for_lane<1>(begin, smaller(begin + kSumChunk, n), t % kWarp, [&](int64_t i, Many<1>) { f(i); });
  }
}

// --- sums and the largest ------------------------------------------------------------------------

template <class T, int kThreads>
struct ColumnShared {
  Key<T> keys[kThreads];
  double parts[kThreads / kWarp];
};

// The sum over a column of n: f(i, Many<k>, x) fills x[k] with what is added of elements i, i + 32,
// ... All threads get it.
template <class Block, class Shared, class F>
ARC_TOPK_DEVICE double sum_of_column(Block& block, Shared& shared, int64_t n, const F& f) {
  constexpr int kWarps = Block::kThreads / kWarp;
  double sum = 0;
  for (int64_t first = 0; first < n; first += kWarps * kSumChunk) {
    typename Block::template Each<Sums<double, 1>> part;
    block.each([&](int t) {
      double its = 0;
      const int64_t begin = first + t / kWarp * kSumChunk;
      if (begin < n) {
        for_lane<4>(begin, smaller(begin + kSumChunk, n), t % kWarp,
                    [&]<int kHas>(int64_t i, Many<kHas> many) {
                      double x[kHas];
                      f(i, many, x);
                      ARC_TOPK_UNROLL
                      for (int j = 0; j < kHas; ++j) its = its + x[j];
                    });
      }
      part[t].value[0] = its;
    });
    block.group_sums(part, kWarp);
    block.each([&](int t) {
      if (t % kWarp == 0) shared.parts[t / kWarp] = part[t].value[0];
    });
    block.sync();
    const auto chunks = static_cast<int>(smaller<int64_t>(kWarps, divide_up(n - first, kSumChunk)));
    for (int warp = 0; warp < chunks; ++warp) sum = sum + shared.parts[warp];
    block.sync();
  }
  return sum;
}

// The largest of the threads' keys, for all of them. To be called again behind another sync() only.
template <class Block, class Shared, class Keys>
ARC_TOPK_DEVICE auto largest_of(Block& block, Shared& shared, Keys& its) {
  block.each([&](int t) { shared.keys[t] = its[t]; });
  block.sync();
  block.each([&](int t) {
    if (t >= kWarp) return;
    for (int i = t + kWarp; i < Block::kThreads; i += kWarp)
      shared.keys[t] = larger(shared.keys[t], shared.keys[i]);
  });
  block.sync();
  auto largest = shared.keys[0];
  for (int i = 1; i < kWarp; ++i) largest = larger(largest, shared.keys[i]);
  return largest;
}

// The squared norm of a column of m numbers that lie `apart`.
template <class T, class Block, class Shared>
ARC_TOPK_DEVICE double squares_of_column(Block& block, Shared& shared, const T* p, int64_t m,
                                         int64_t apart) {
  return sum_of_column(block, shared, m, [&]<int kHas>(int64_t i, Many<kHas>, double(&x)[kHas]) {
    ARC_TOPK_UNROLL
    for (int j = 0; j < kHas; ++j) x[j] = static_cast<double>(p[(i + 32 * j) * apart]);
    ARC_TOPK_UNROLL
    for (int j = 0; j < kHas; ++j) x[j] = x[j] * x[j];
  });
}

// What brings a column of n to about 1, or 0: x(i) is an element, of its own thread.
template <class T, class Block, class Shared, class F>
ARC_TOPK_DEVICE double scale_of_column(Block& block, Shared& shared, int64_t n, const F& x) {
  typename Block::template Each<Key<T>> keys;
  block.each([&](int t) {
    Key<T> largest = 0;  // NaN has a larger one than any number
    for_own<Block::kThreads>(n, t, [&](int64_t i) { largest = larger(largest, key_of(x(i))); });
    keys[t] = largest;
  });
  return scale_to_one(static_cast<double>(number_of<T>(largest_of(block, shared, keys))));
}

// --- W -------------------------------------------------------------------------------------------

// A column of W: r at unit norm; zeros where r is zero or not finite. w may be r.
template <class T, class Block, class Shared>
ARC_TOPK_DEVICE void unit_column(Block& block, Shared& shared, const T* r, int64_t n, float* w) {
  const double scale = scale_of_column<T>(block, shared, n, [&](int64_t i) { return r[i]; });
  double factor = 0;
  if (scale != 0) {
    const double squares =
        sum_of_column(block, shared, n, [&]<int kHas>(int64_t i, Many<kHas>, double(&x)[kHas]) {
          ARC_TOPK_UNROLL
          for (int j = 0; j < kHas; ++j) x[j] = static_cast<double>(r[i + 32 * j]) * scale;
          ARC_TOPK_UNROLL
          for (int j = 0; j < kHas; ++j) x[j] = x[j] * x[j];
        });
    factor = scale / std::sqrt(squares);
  }
  block.each([&](int t) {
    for_own<Block::kThreads>(n, t, [&](int64_t i) {
      w[i] = scale == 0 ? 0.0f : static_cast<float>(static_cast<double>(r[i]) * factor);
    });
  });
}

// The columns of W that are zero are drawn.
struct Draw {
  static constexpr int kThreads = cuda::kThreads;
  using Shared = ColumnShared<float, kThreads>;

  Bucket b;
  uint64_t seed;
  uint64_t step;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Column column(b, block.index());
    const Segment& s = b.segments[column.segment];
    if (column.c >= s.kept) return;
    float* w = basis_of(b, s) + column.c * factor_stride(s.cols);
    if (!is_zero(block, w, s.cols)) return;
    block.each([&](int t) {
      for (int64_t j = 4 * t; j < s.cols; j += 4 * kThreads) {
        const Normals four = basis_normals(static_cast<uint32_t>(j / 4),
                                           static_cast<uint32_t>(column.c), s.stream, seed, step);
        ARC_TOPK_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (j + i < s.cols) w[j + i] = four.z[i];
        }
      }
    });
    block.sync();
    unit_column(block, shared, w, s.cols, w);
  }

 private:
  // Ends with the first stretch that has anything: as good as nothing is read of a basis.
  template <class Block>
  ARC_TOPK_DEVICE static bool is_zero(Block& block, const float* w, int64_t n) {
    for (int64_t first = 0; first < n; first += kThreads) {
      typename Block::template Each<bool> found;
      block.each([&](int t) { found[t] = first + t < n && w[first + t] != 0; });
      if (block.any(found)) return false;
    }
    return true;
  }
};

}  // namespace arc_topk::cuda
