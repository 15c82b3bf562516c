// used[]: whether this rank's gradient has a non-zero element, where that matters. A block stops at
// the first that it finds, and does not begin where another block of the same segment has found
// one: a tensor with a gradient costs next to nothing.
#pragma once

#include "kernels/cuda/estimate.h"
#include "kernels/cuda/pieces.h"

namespace arc_topk::cuda {

template <class Bits>
struct Scan {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = 16 / sizeof(Bits);
  struct Shared {
    bool last;
  };

  Bucket b;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Scratch scratch(b);
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    uint32_t* used = scratch.used + p.segment;
    block.each([&](int t) {
      if (t == 0 && is_first(p)) give_back(b, p.segment);
    });
    if (b.may_be_unused && s.compressed() && !is_known(block, used) &&
        finds(block, range_of(s, p))) {
      block.each([&](int t) {
        if (t == 0) block.mark(used, 1u);
      });
    }
    if (!is_last(block, scratch.counters, 1, static_cast<uint32_t>(block.blocks()), shared.last))
      return;
    block.each([&](int t) {
      for (int64_t i = t; i < b.num_segments; i += kThreads) {
        b.used[i] = !b.may_be_unused || block.fresh(scratch.used + i) != 0;
        b.bad[i] = 0;
        scratch.used[i] = 0;
      }
    });
  }

 private:
  // The same answer for all threads: another block may be writing it at this moment.
  template <class Block>
  ARC_TOPK_DEVICE static bool is_known(Block& block, const uint32_t* used) {
    typename Block::template Each<bool> known;
    block.each([&](int t) { known[t] = block.fresh(used) != 0; });
    return block.any(known);
  }

  template <class Block>
  ARC_TOPK_DEVICE bool finds(Block& block, Range range) const {
    const Bits* gradient = static_cast<const Bits*>(b.gradient);
    const int64_t runs = runs_of<kVector>(range.begin, range.end);
    for (int64_t first = 0; first < runs; first += kThreads) {
      typename Block::template Each<bool> found;
      block.each([&](int t) {
        found[t] = first + t < runs &&
                   has_nonzero(gradient, run_of<kVector>(range.begin, range.end, first + t));
      });
      if (block.any(found)) return true;
    }
    return false;
  }

  ARC_TOPK_DEVICE static bool has_nonzero(const Bits* from, Run run) {
    alignas(16) Bits x[kVector];
    if (run.is_vector<kVector>()) {
      copy_aligned<16>(x, from + run.index);
    } else {
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) x[j] = run.has(j) ? from[run.index + j] : Bits{0};
    }
    Bits any = 0;
    ARC_TOPK_UNROLL
    for (int j = 0; j < kVector; ++j) any = static_cast<Bits>(any | x[j]);
    return static_cast<Bits>(any << 1) != 0;  // but for the sign: -0 is zero
  }
};

}  // namespace arc_topk::cuda
