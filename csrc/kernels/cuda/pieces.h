// How the work is split: which elements a piece has, and where a bucket's scratch memory goes.
#pragma once

#include "kernels/cuda/elements.h"

namespace arc_topk::cuda {

constexpr int64_t kGrain = 8192;        // elements of a piece: one block's share
constexpr int64_t kManyRows = 1 << 16;  // segments of more rows are selected from by many blocks
constexpr int kDigitBits = 11;          // of the radix selection
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

// What a selection by many blocks knows of the K-th largest key of a segment so far.
struct Search {
  uint64_t known;    // its leading bits
  uint32_t left;     // how many keys with those bits are kept
  uint32_t arrived;  // rows whose blocks are through
  uint32_t bins[kBins];
};

// Bucket::scratch. All counters are zero between two kernels: whoever comes last sets them back.
struct Scratch {
  uint32_t* counters;  // blocks that are through
  uint32_t* used;      // a segment each: marks on their way to used[] or outcome[]
  uint32_t* bad;
  uint32_t* arrived;  // a piece each: columns of the row beginning there that are through
  uint32_t* above;    // a piece each: keys above the smallest one that is kept, and equal to it
  uint32_t* equal;
  double* partial;  // a piece each: sketch_dim sums of a part of a row, in the work type
  Search* searches;

  static constexpr int kCounters = 16;

  ARC_TOPK_HD static int64_t header_bytes(const Bucket& b) {
    const int64_t words = kCounters + 2 * b.num_segments + 3 * b.num_pieces;
    return divide_up(4 * words, 16) * 16;
  }
  ARC_TOPK_HD static int64_t partial_bytes(const Bucket& b) {
    return 8 * b.sketch_dim * b.num_pieces;
  }
  ARC_TOPK_HD static int64_t bytes(const Bucket& b, int64_t num_keys) {
    const auto searches = num_keys / kManyRows + 1;
    return header_bytes(b) + partial_bytes(b) + searches * static_cast<int64_t>(sizeof(Search));
  }

  ARC_TOPK_HD explicit Scratch(const Bucket& b) {
    counters = static_cast<uint32_t*>(b.scratch);
    used = counters + kCounters;
    bad = used + b.num_segments;
    arrived = bad + b.num_segments;
    above = arrived + b.num_pieces;
    equal = above + b.num_pieces;
    char* behind = static_cast<char*>(b.scratch) + header_bytes(b);
    partial = reinterpret_cast<double*>(behind);
    searches = reinterpret_cast<Search*>(behind + partial_bytes(b));
  }

  // Two segments of more than kManyRows rows never begin in the same stretch of kManyRows keys.
  ARC_TOPK_DEVICE Search& search_of(const Segment& s) const { return searches[s.key / kManyRows]; }
};

}  // namespace arc_topk::cuda
