// The K rows of largest key of segments of very many rows (Top-K's elements), by many blocks: the
// same radix selection as in select.h, a launch for each digit. A block counts the keys of its
// piece; the last block of a segment finds the bin.
#pragma once

#include "kernels/cuda/select.h"

namespace arc_topk::cuda {

// One digit.
template <class T>
struct CountDigit {
  static constexpr int kThreads = cuda::kThreads;
  using K = Key<T>;
  struct Shared {
    uint32_t bins[kBins];
    BinSearch found;
    bool last;
  };

  KeyMaker<T> maker;
  int from;  // bits below which this pass looks; all: the first pass

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Bucket& b = maker.b;
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    if (!s.has_many_rows()) return;
    Search& search = Scratch(b).searches[s.large];
    const bool is_first_digit = from == 8 * sizeof(K);
    count(block, shared, p, search, is_first_digit ? 0 : static_cast<K>(search.known));
    const auto rows = static_cast<uint32_t>(p.row_end - p.row_begin);
    if (!is_last(block, &search.arrived, rows, static_cast<uint32_t>(s.rows), shared.last)) return;
    conclude(block, shared, s, search, is_first_digit);
  }

 private:
  template <class Block>
  ARC_TOPK_DEVICE void count(Block& block, Shared& shared, const Piece& p, Search& search,
                             K known) const {
    const auto digit = Digit<K>::below(from);
    block.each([&](int t) {
      for (int i = t; i < kBins; i += kThreads) shared.bins[i] = 0;
    });
    block.sync();
    maker.each(block, p.segment, p.row_begin, p.row_end, [&](int, int64_t, K key) {
      if ((key & digit.above) == known) block.add(&shared.bins[digit.of(key)], 1);
    });
    block.sync();
    block.each([&](int t) {
      for (int i = t; i < kBins; i += kThreads) {
        if (shared.bins[i] != 0) block.add(&search.bins[i], shared.bins[i]);
      }
    });
  }

  template <class Block>
  ARC_TOPK_DEVICE void conclude(Block& block, Shared& shared, const Segment& s, Search& search,
                                bool is_first_digit) const {
    const uint32_t left = is_first_digit ? static_cast<uint32_t>(s.kept) : search.left;
    find_bin(
        block, left, [&](int i) { return block.fresh(&search.bins[i]); }, shared.found);
    block.each([&](int t) {
      for (int i = t; i < kBins; i += kThreads) search.bins[i] = 0;
      if (t != 0) return;
      const uint64_t known = is_first_digit ? 0 : search.known;
      search.known = known | static_cast<uint64_t>(shared.found.bin) << Digit<K>::below(from).shift;
      search.left = shared.found.left;
    });
  }
};

// How many keys of a piece lie above the threshold, and how many on it.
template <class T>
struct CountTaken {
  static constexpr int kThreads = cuda::kThreads;
  using K = Key<T>;
  using Two = Sums<double, 2>;
  struct Shared {
    Two warps[kWarp];
  };

  KeyMaker<T> maker;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Bucket& b = maker.b;
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    if (!s.has_many_rows()) return;
    const Scratch scratch(b);
    const auto threshold = static_cast<K>(scratch.searches[s.large].known);
    typename Block::template Each<Two> counts;
    block.each([&](int t) { counts[t] = {}; });
    maker.each(block, p.segment, p.row_begin, p.row_end, [&](int t, int64_t, K key) {
      counts[t].value[0] += key > threshold;
      counts[t].value[1] += key == threshold;
    });
    block_sums(block, counts, shared.warps);
    block.each([&](int t) {
      if (t != 0) return;
      scratch.above[block.index()] = static_cast<uint32_t>(counts[t].value[0]);
      scratch.equal[block.index()] = static_cast<uint32_t>(counts[t].value[1]);
    });
  }
};

// The picks of a piece, behind those of the segment's pieces before it.
template <class T>
struct TakeMany {
  static constexpr int kThreads = cuda::kThreads;
  using K = Key<T>;
  using Two = Sums<double, 2>;
  struct Shared {
    Two warps[kWarp];
    uint32_t scan[kWarp];
    Taken<K> taken;
  };

  KeyMaker<T> maker;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Bucket& b = maker.b;
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    if (!s.has_many_rows()) return;
    const Scratch scratch(b);
    const Search& search = scratch.searches[s.large];
    const int64_t first = find_piece(b, p.segment, 0);
    typename Block::template Each<Two> before;
    block.each([&](int t) {
      before[t] = {};
      for (int64_t i = first + t; i < block.index(); i += kThreads) {
        before[t].value[0] += scratch.above[i];
        before[t].value[1] += scratch.equal[i];
      }
    });
    block_sums(block, before, shared.warps);
    block.each([&](int t) {
      if (t != 0) return;
      shared.taken = {static_cast<K>(search.known), search.left,
                      static_cast<uint32_t>(before[t].value[0]),
                      static_cast<uint32_t>(before[t].value[1])};
    });
    block.sync();
    Taken<K> taken = shared.taken;
    const auto make = [&](int64_t row, int rows) { return maker.make(p.segment, row, rows); };
    take<T>(block, make, p.row_begin, p.row_end, taken, b.picks + s.pick, shared.scan);
  }
};

}  // namespace arc_topk::cuda
