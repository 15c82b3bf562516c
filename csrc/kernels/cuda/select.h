// The K rows of largest key of a segment, by one block: radix selection in shared memory. Leading
// bits first, the keys are counted by 11 bits at a time until all bits of the smallest key that is
// kept are known; one more pass, in order of rows, takes what is above it and as many equal keys as
// are left.
#pragma once

#include "kernels/cuda/message.h"
#include "random.h"

namespace arc_topk::cuda {

// --- keys ----------------------------------------------------------------------------------------

#if defined(__CUDA_ARCH__)
ARC_TOPK_DEVICE double exact_add(double a, double b) { return __dadd_rn(a, b); }
ARC_TOPK_DEVICE double exact_mul(double a, double b) { return __dmul_rn(a, b); }
#else
ARC_TOPK_DEVICE double exact_add(double a, double b) { return a + b; }
ARC_TOPK_DEVICE double exact_mul(double a, double b) { return a * b; }
#endif
ARC_TOPK_DEVICE float exact_add(float a, float b) { return exact::add(a, b); }
ARC_TOPK_DEVICE float exact_mul(float a, float b) { return exact::mul(a, b); }

// Makes the keys of any row.
template <class T>
struct KeyMaker {
  Bucket b;
  Keys keys;
  T mean;  // 1 / N
  T eta;
  T keep;

  KeyMaker(const Bucket& bucket, const Keys& its_keys)
      : b(bucket),
        keys(its_keys),
        mean(static_cast<T>(1.0 / bucket.world_size)),
        eta(static_cast<T>(bucket.eta)),
        keep(static_cast<T>(1 - bucket.eta)) {}

  // Those of rows [begin, end) by the threads of a block. Adds their scores to sums.
  template <class Block>
  ARC_TOPK_DEVICE void make(Block& block, int64_t segment, int64_t begin, int64_t end,
                            typename Block::template Each<Sums<double, 1>>& sums) const {
    const Segment& s = b.segments[segment];
    block.each([&](int t) {
      sums[t] = {};
      if (keys.kind == Keys::kRandom) {
        for (int64_t i = begin / 4 + t; i * 4 < end; i += Block::kThreads) random(s, i, begin, end);
        return;
      }
      for (int64_t row = begin + t; row < end; row += Block::kThreads) {
        if (keys.kind == Keys::kSketch) {
          sums[t].value[0] += score(s, row);
        } else {
          magnitude(s, row, b.used[segment] != 0);
        }
      }
    });
  }

 private:
  ARC_TOPK_DEVICE Key<T>* key_at(const Segment& s, int64_t row) const {
    return static_cast<Key<T>*>(b.keys) + s.key + row;
  }

  // Columns in their order, each operation rounded: the same bits on every machine.
  ARC_TOPK_DEVICE double score(const Segment& s, int64_t row) const {
    const T* sketch = static_cast<const T*>(b.first) + s.sketch + row * b.sketch_dim;
    T sum = 0;
    for (int64_t k = 0; k < b.sketch_dim; ++k) {
      const T x = exact_mul(sketch[k], mean);
      sum = exact_add(sum, exact_mul(x, x));
    }
    *key_at(s, row) = key_of(sum);
    return static_cast<double>(sum);
  }

  ARC_TOPK_DEVICE void random(const Segment& s, int64_t group, int64_t begin, int64_t end) const {
    const Philox four =
        selection_keys(static_cast<uint32_t>(group), s.stream, keys.seed, keys.step);
    ARC_TOPK_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t row = group * 4 + j;
      if (row >= begin && row < end) *key_at(s, row) = four.word[j];
    }
  }

  ARC_TOPK_DEVICE void magnitude(const Segment& s, int64_t row, bool prepared) const {
    switch (b.feedback) {
      case FeedbackKind::kNone:
        return magnitude_with(NoFeedback{}, s, row, prepared);
      case FeedbackKind::kEF14:
        return magnitude_with(EF14{}, s, row, prepared);
      case FeedbackKind::kEF21:
        return magnitude_with(EF21{}, s, row, prepared);
      case FeedbackKind::kEF21M:
        return magnitude_with(EF21M<T>{eta, keep}, s, row, prepared);
    }
  }
  template <class Feedback>
  ARC_TOPK_DEVICE void magnitude_with(const Feedback& feedback, const Segment& s, int64_t row,
                                      bool prepared) const {
    const Arrays<Feedback, AnyType, AnyType> arrays(b);
    const Run run{s.offset + row, 0, 1};
    Values<T, 1> e;
    T x[1];
    // Of one element: never a vector of 16 bytes.
    arrays.load(run, e);
    message(feedback, arrays.a, e, prepared, x);
    *key_at(s, row) = key_of(x[0]);
  }
};

// --- digits --------------------------------------------------------------------------------------

// The keys' bits that are looked at in one pass, and those above them, which are known.
template <class K>
struct Digit {
  int shift;
  K mask;
  K above;

  // The pass after the one that has found all bits from `from` on.
  ARC_TOPK_HD static Digit below(int from) {
    const int bits = smaller(kDigitBits, from);
    const int all = 8 * sizeof(K);
    return {from - bits, (K{1} << bits) - 1, from < all ? ~K{0} << from : K{0}};
  }
  ARC_TOPK_DEVICE uint32_t of(K key) const { return static_cast<uint32_t>((key >> shift) & mask); }
};

// Shared memory of find_bin().
struct BinSearch {
  uint32_t warps[kWarp];
  uint32_t bin;
  uint32_t left;
};

// The largest bin down to which, from the top, there are `left` keys; found.left of them are its
// own. bins(i) is how many keys bin i has.
template <class Block, class Bins>
ARC_TOPK_DEVICE void find_bin(Block& block, uint32_t left, const Bins& bins, BinSearch& found) {
  constexpr int kEach = kBins / Block::kThreads;
  static_assert(kEach * Block::kThreads == kBins);
  typename Block::template Each<uint32_t> above;
  block.each([&](int t) {
    above[t] = 0;
    for (int i = 0; i < kEach; ++i) above[t] += bins(kBins - 1 - (t * kEach + i));
  });
  block.exclusive_sums(above, found.warps);
  block.each([&](int t) {
    uint32_t before = above[t];
    for (int i = 0; i < kEach; ++i) {
      const auto bin = static_cast<uint32_t>(kBins - 1 - (t * kEach + i));
      const uint32_t count = bins(static_cast<int>(bin));
      if (before < left && left <= before + count) {
        found.bin = bin;
        found.left = left - before;
      }
      before += count;
    }
  });
  block.sync();
}

// Rows [begin, end), in their order: what is above `threshold` is taken, of the equal keys the
// first `allowed`. Both counts are of rows before `begin`, and go on.
template <class K>
struct Taken {
  K threshold;
  uint32_t allowed;
  uint32_t above;
  uint32_t equal;
};
template <class K, class Block>
ARC_TOPK_DEVICE void take(Block& block, const K* keys, int64_t begin, int64_t end, Taken<K>& taken,
                          int32_t* picks, uint32_t (&warps)[kWarp]) {
  constexpr int kEach = 8;  // rows of a thread; fewer than 2^16 of a block
  for (int64_t first = begin; first < end; first += Block::kThreads * kEach) {
    typename Block::template Each<uint32_t> before;  // above in the upper half, equal in the lower
    const auto count = [&](K key) {
      return key > taken.threshold ? 1u << 16 : key == taken.threshold ? 1u : 0u;
    };
    block.each([&](int t) {
      const int64_t row = first + t * kEach;
      before[t] = 0;
      for (int i = 0; i < kEach; ++i) before[t] += row + i < end ? count(keys[row + i]) : 0;
    });
    const uint32_t all = block.exclusive_sums(before, warps);
    block.each([&](int t) {
      const int64_t row = first + t * kEach;
      uint32_t above = taken.above + (before[t] >> 16);
      uint32_t equal = taken.equal + (before[t] & 0xFFFFu);
      for (int i = 0; i < kEach && row + i < end; ++i) {
        const uint32_t one = count(keys[row + i]);
        const bool takes = one > 1 || (one == 1 && equal < taken.allowed);
        if (takes) picks[above + smaller(equal, taken.allowed)] = static_cast<int32_t>(row + i);
        above += one >> 16;
        equal += one & 1;
      }
    });
    taken.above += all >> 16;
    taken.equal += all & 0xFFFFu;
  }
}

// --- one block a segment -------------------------------------------------------------------------

template <class T>
struct Select {
  static constexpr int kThreads = 1024;
  using K = Key<T>;
  struct Shared {
    uint32_t bins[kBins];
    BinSearch found;
    Sums<double, 1> warps[kWarp];
    Outcome outcome;
  };

  KeyMaker<T> maker;
  bool leaves_large;  // segments of more than kManyRows rows are someone else's

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared& shared) const {
    const Bucket& b = maker.b;
    const int64_t segment = block.index();
    const Segment& s = b.segments[segment];
    if (!s.compressed()) return;
    block.each([&](int t) {
      if (t != 0) return;
      shared.outcome = b.outcome[segment];
      if (maker.keys.kind != Keys::kSketch) return;
      shared.outcome = read_outcome(b, s, nullptr);
      b.outcome[segment] = shared.outcome;
    });
    block.sync();
    if (shared.outcome != Outcome::kNormal || (leaves_large && s.rows > kManyRows)) return;

    typename Block::template Each<Sums<double, 1>> sums;
    maker.make(block, segment, 0, s.rows, sums);
    block_sums(block, sums, shared.warps);
    if (maker.keys.kind == Keys::kSketch) {
      block.each([&](int t) {
        if (t == 0) block.add(&b.energy->total, sums[t].value[0]);
      });
    }
    pick(block, shared, s);
  }

 private:
  template <class Block>
  ARC_TOPK_DEVICE void pick(Block& block, Shared& shared, const Segment& s) const {
    const K* keys = static_cast<const K*>(maker.b.keys) + s.key;
    K known = 0;
    auto left = static_cast<uint32_t>(s.kept);
    for (int from = 8 * sizeof(K); from > 0;) {
      const auto digit = Digit<K>::below(from);
      from = digit.shift;
      block.each([&](int t) {
        for (int i = t; i < kBins; i += kThreads) shared.bins[i] = 0;
      });
      block.sync();
      block.each([&](int t) {
        for (int64_t row = t; row < s.rows; row += kThreads) {
          if ((keys[row] & digit.above) == known) block.add(&shared.bins[digit.of(keys[row])], 1);
        }
      });
      block.sync();
      find_bin(
          block, left, [&](int i) { return shared.bins[i]; }, shared.found);
      known |= static_cast<K>(shared.found.bin) << digit.shift;
      left = shared.found.left;
      block.sync();
    }
    Taken<K> taken{known, left, 0, 0};
    take(block, keys, 0, s.rows, taken, maker.b.picks + s.pick, shared.found.warps);
  }
};

}  // namespace arc_topk::cuda
