// How the work is split: which elements a piece has, and where a bucket's scratch memory goes.
#pragma once

#include "kernels/cuda/elements.h"
#include "kernels/levels.h"

namespace arc_topk::cuda {

constexpr int64_t kGrain = 8192;  // elements of a piece: one block's share
constexpr int kDigitBits = 11;    // of the radix selection
constexpr int kBins = 1 << kDigitBits;

// Elements [begin, end) of the bucket.
struct Range {
  int64_t begin;
  int64_t end;
};

// Those of a piece.
ARC_TOPK_DEVICE Range range_of(const Segment& s, const Piece& p) {
  const bool part = p.col_end - p.col_begin < s.cols;
  const int64_t begin = p.row_begin * s.cols + (part ? p.col_begin : 0);
  const int64_t end = part ? p.row_begin * s.cols + p.col_end : p.row_end * s.cols;
  return {s.offset + smaller(begin, s.numel), s.offset + smaller(end, s.numel)};
}

// A segment's first piece comes first; one of them has to do what is done once a segment.
ARC_TOPK_DEVICE bool is_first(const Piece& p) { return p.row_begin == 0 && p.col_begin == 0; }

// The first piece of a segment from `row` on. The table is in the order of segments and rows.
ARC_TOPK_DEVICE int64_t find_piece(const Bucket& b, int64_t segment, int64_t row) {
  int64_t begin = 0, count = b.num_pieces;
  while (count > 0) {
    const int64_t half = count / 2;
    const Piece& p = b.pieces[begin + half];
    const bool before = p.segment < segment || (p.segment == segment && p.row_begin < row);
    if (before) {
      begin += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return begin;
}

// How many of `count` ascending numbers are less than `bound`; get(i) is number i. All threads look
// at once, each at the end of another stretch: what one thread would find by ten reads one after
// the other takes two. A sync() as well, where there are any.
template <class Block, class Get>
ARC_TOPK_DEVICE int64_t count_below(Block& block, int64_t count, int64_t bound, const Get& get) {
  int64_t begin = 0;
  while (count > begin) {
    const int64_t stretch = divide_up(count - begin, Block::kThreads);
    typename Block::template Each<bool> below;
    block.each([&](int t) {
      const int64_t first = begin + t * stretch;
      below[t] = first < count && get(smaller(first + stretch, count) - 1) < bound;
    });
    begin += block.count(below) * stretch;
    if (stretch == 1) break;
    count = smaller(count, begin + stretch - 1);  // the stretch's last is not below
  }
  return smaller(begin, count);
}

// What a selection by many blocks knows of the K-th largest key of a segment so far.
struct Search {
  uint64_t known;    // its leading bits
  uint32_t left;     // how many keys with those bits are kept
  uint32_t arrived;  // rows whose blocks are through
  uint32_t bins[kBins];
};

// Bucket::scratch. All counters are zero between two kernels: whoever comes last sets them back.
//
// It is small beside the payloads, so that what a step needs of memory is these: a piece has words
// of its own only where rows of a sketch are in several pieces, or where many blocks select.
struct Scratch {
  uint32_t* counters;  // blocks that are through
  uint32_t* used;      // a segment each: marks on their way to used[] or outcome[]
  uint32_t* bad;
  uint32_t* arrived;  // a piece each: columns of the row beginning there that are through
  void* partial;      // a piece each: sketch_dim sums of a part of a row, in the work type
  double* squares;    // a piece each: the sum of squares of a part of a row
  uint32_t* above;    // a piece each: keys above the smallest one that is kept, and equal to it
  uint32_t* equal;
  Search* searches;  // a segment of many rows each
  double* columns;   // low rank: P by columns, while they are made orthonormal
  uintptr_t end;

  static constexpr int kCounters = 16;

  ARC_TOPK_HD explicit Scratch(const Bucket& b) {
    const bool parts = b.splits_rows && b.sketch_dim > 0;
    auto at = reinterpret_cast<uintptr_t>(b.scratch);
    counters = take<uint32_t>(at, kCounters);
    used = take<uint32_t>(at, b.num_segments);
    bad = take<uint32_t>(at, b.num_segments);
    arrived = take<uint32_t>(at, parts ? b.num_pieces : 0);
    partial = take<char>(at, parts ? partial_bytes(b) * b.num_pieces : 0);
    squares = take<double>(at, parts && sends_levels(b) ? b.num_pieces : 0);
    above = take<uint32_t>(at, selects_by_many(b) ? b.num_pieces : 0);
    equal = take<uint32_t>(at, selects_by_many(b) ? b.num_pieces : 0);
    searches = take<Search>(at, selects_by_many(b) ? b.num_large : 0);
    columns = take<double>(at, b.factors.left_numel);
    end = at;
  }
  ARC_TOPK_HD static int64_t partial_bytes(const Bucket& b) {
    return b.sketch_dim * size_of(work_type(b.gradient_type));
  }
  // Scores of a sketch are few: rows of one element would not be worth their sketch.
  ARC_TOPK_HD static bool selects_by_many(const Bucket& b) {
    return b.sketch_dim == 0 && b.num_large > 0;
  }
  static int64_t bytes(Bucket b) {
    b.scratch = nullptr;
    return static_cast<int64_t>(Scratch(b).end);
  }

 private:
  template <class T>
  ARC_TOPK_HD static T* take(uintptr_t& at, int64_t count) {
    T* const taken = reinterpret_cast<T*>(at);
    at += static_cast<uintptr_t>(divide_up(count * static_cast<int64_t>(sizeof(T)), 16) * 16);
    return taken;
  }
};

}  // namespace arc_topk::cuda
