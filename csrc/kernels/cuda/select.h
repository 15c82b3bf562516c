// The K rows of largest key of a segment, by one block: radix selection in shared memory. Leading
// bits first, the keys are counted by 11 bits at a time until all bits of the smallest key that is
// kept are known; one more pass, in order of rows, takes what is above it and as many equal keys as
// are left. The keys of as many rows as most matrices have are made once and stay in shared memory.
#pragma once

#include "base/random.h"
#include "kernels/cuda/message.h"

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

// Makes the keys of any rows, whenever they are asked for: to keep them would take as much memory
// as Top-K's messages do, and reading them as long as making them.
template <class T>
struct KeyMaker {
  static constexpr int kRows = 32 / sizeof(T);  // a thread's at a time, one after the other
  struct Rows {
    Key<T> key[kRows];
  };

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

  // Those of `count` rows of a segment, from `row` on. Not of a sketch: see fill().
  ARC_TOPK_DEVICE Rows make(int64_t segment, int64_t row, int count) const {
    const Segment& s = b.segments[segment];
    Rows rows;
    if (keys.kind == Keys::kRandom) {
      random(s, row, count, rows);
    } else {
      magnitudes(s, row, count, b.used[segment] != 0, rows);
    }
    return rows;
  }

  // Those of rows [begin, end), to memory that the block shares.
  template <class Block>
  ARC_TOPK_DEVICE void fill(Block& block, int64_t segment, int64_t begin, int64_t end,
                            Key<T>* to) const {
    if (keys.kind == Keys::kSketch) return scores(block, b.segments[segment], begin, end, to);
    each(block, segment, begin, end, [&](int, int64_t row, Key<T> key) { to[row - begin] = key; });
  }

  // The threads of a block over rows [begin, end): f(t, row, key).
  template <class Block, class F>
  ARC_TOPK_DEVICE void each(Block& block, int64_t segment, int64_t begin, int64_t end,
                            const F& f) const {
    block.each([&](int t) {
      for (int64_t row = begin + t * kRows; row < end; row += Block::kThreads * kRows) {
        const auto count = static_cast<int>(smaller<int64_t>(end - row, kRows));
        const Rows rows = make(segment, row, count);
        ARC_TOPK_UNROLL
        for (int i = 0; i < kRows; ++i) {
          if (i < count) f(t, row + i, rows.key[i]);
        }
      }
    });
  }

 private:
  // ||P_j||^2. Columns in their order, each operation rounded: the same bits on every machine.
  // Neighbouring threads read neighbouring rows, each thread several whose reads are under way
  // together.
  template <class Block>
  ARC_TOPK_DEVICE void scores(Block& block, const Segment& s, int64_t begin, int64_t end,
                              Key<T>* to) const {
    constexpr int kTogether = 4;
    const T* sketch = static_cast<const T*>(b.first) + s.sketch;
    block.each([&](int t) {
      for (int64_t first = begin + t; first < end; first += Block::kThreads * kTogether) {
        T sums[kTogether] = {};
        for (int64_t k = 0; k < b.sketch_dim; ++k) {
          ARC_TOPK_UNROLL
          for (int i = 0; i < kTogether; ++i) {
            const int64_t row = first + i * Block::kThreads;
            if (row >= end) continue;
            const T x = exact_mul(sketch[row * b.sketch_dim + k], mean);
            sums[i] = exact_add(sums[i], exact_mul(x, x));
          }
        }
        ARC_TOPK_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          const int64_t row = first + i * Block::kThreads;
          if (row < end) to[row - begin] = key_of_score(sums[i]);
        }
      }
    });
  }

  ARC_TOPK_DEVICE void random(const Segment& s, int64_t row, int count, Rows& rows) const {
    Philox four;
    ARC_TOPK_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (i >= count) continue;
      const auto group = static_cast<uint32_t>((row + i) / 4);
      if (i == 0 || (row + i) % 4 == 0) {
        four = selection_keys(group, s.stream, keys.seed, keys.step);
      }
      const int64_t word = (row + i) % 4;
      rows.key[i] = word == 0   ? four.word[0]
                    : word == 1 ? four.word[1]
                    : word == 2 ? four.word[2]
                                : four.word[3];
    }
  }

  ARC_TOPK_DEVICE void magnitudes(const Segment& s, int64_t row, int count, bool prepared,
                                  Rows& rows) const {
    with_feedback(b.feedback, eta, keep, [&](const auto& feedback) {
      magnitudes_with(feedback, s, row, count, prepared, rows);
    });
  }
  // |X_i|, of segments of one column: rows are elements.
  template <class Feedback>
  ARC_TOPK_DEVICE void magnitudes_with(const Feedback& feedback, const Segment& s, int64_t row,
                                       int count, bool prepared, Rows& rows) const {
    const Arrays<Feedback, AnyType, AnyType, T> arrays(b, LossScale<T>(b));
    const Run run{s.offset + row, 0, count};
    Values<T, kRows> e;
    T x[kRows];
    arrays.load(run, e);
    message(feedback, arrays.a, e, prepared, x);
    ARC_TOPK_UNROLL
    for (int i = 0; i < kRows; ++i) rows.key[i] = key_of(x[i]);
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
  exclusive_sums(block, above, found.warps);
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
// make(row, count): the keys of some rows.
template <class T, class Block, class Make>
ARC_TOPK_DEVICE void take(Block& block, const Make& make, int64_t begin, int64_t end,
                          Taken<Key<T>>& taken, int32_t* picks, uint32_t (&warps)[kWarp]) {
  constexpr int kRows = KeyMaker<T>::kRows;
  for (int64_t first = begin; first < end; first += Block::kThreads * kRows) {
    // Those above in the upper half, equal ones in the lower: a block sees fewer than 2^16 rows.
    typename Block::template Each<uint32_t> before;
    typename Block::template Each<typename KeyMaker<T>::Rows> rows;
    const auto count = [&](Key<T> key) {
      return key > taken.threshold ? 1u << 16 : key == taken.threshold ? 1u : 0u;
    };
    const auto rows_of = [&](int t) {
      return static_cast<int>(
          larger<int64_t>(smaller<int64_t>(end - (first + t * kRows), kRows), 0));
    };
    block.each([&](int t) {
      before[t] = 0;
      if (rows_of(t) == 0) return;
      rows[t] = make(first + t * kRows, rows_of(t));
      ARC_TOPK_UNROLL
      for (int i = 0; i < kRows; ++i) before[t] += i < rows_of(t) ? count(rows[t].key[i]) : 0;
    });
    const uint32_t all = exclusive_sums(block, before, warps);
    block.each([&](int t) {
      uint32_t above = taken.above + (before[t] >> 16);
      uint32_t equal = taken.equal + (before[t] & 0xFFFFu);
      ARC_TOPK_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (i >= rows_of(t)) continue;
        const uint32_t one = count(rows[t].key[i]);
        const bool takes = one > 1 || (one == 1 && equal < taken.allowed);
        const auto row = static_cast<int32_t>(first + t * kRows + i);
        if (takes) picks[above + smaller(equal, taken.allowed)] = row;
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
  static constexpr int kThreads = 512;
  static constexpr int64_t kCached = 32768 / sizeof(T);  // rows
  using K = Key<T>;
  struct Shared {
    K keys[kCached];
    uint32_t bins[kBins];
    BinSearch found;
    Sums<double, 1> warps[kWarp];
    Outcome outcome;
  };

  KeyMaker<T> maker;

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
    if (shared.outcome != Outcome::kNormal) return;
    if (maker.keys.kind != Keys::kSketch && s.has_many_rows()) return;  // for select_many.h
    pick(block, shared, segment, s);
  }

 private:
  template <class Block>
  ARC_TOPK_DEVICE void pick(Block& block, Shared& shared, int64_t segment, const Segment& s) const {
    constexpr int kBits = 8 * sizeof(K);
    typename Block::template Each<Sums<double, 1>> scores;
    block.each([&](int t) { scores[t] = {}; });
    K known = 0;
    auto left = static_cast<uint32_t>(s.kept);
    for (int from = kBits; from > 0;) {
      const auto digit = Digit<K>::below(from);
      const bool first = from == kBits;
      block.each([&](int t) {
        for (int i = t; i < kBins; i += kThreads) shared.bins[i] = 0;
      });
      for_keys(block, shared, segment, s.rows, first, [&](int64_t, int64_t count) {
        block.each([&](int t) {
          for (int64_t i = t; i < count; i += kThreads) {
            const K key = shared.keys[i];
            if ((key & digit.above) == known) block.add(&shared.bins[digit.of(key)], 1);
            if (first) scores[t].value[0] += static_cast<double>(number_of<T>(key));
          }
        });
      });
      find_bin(
          block, left, [&](int i) { return shared.bins[i]; }, shared.found);
      from = digit.shift;
      known |= static_cast<K>(shared.found.bin) << digit.shift;
      left = shared.found.left;  // found is written again behind for_keys()'s barriers
    }
    Taken<K> taken{known, left, 0, 0};
    for_keys(block, shared, segment, s.rows, false, [&](int64_t begin, int64_t count) {
      const auto make = [&](int64_t row, int rows) {
        typename KeyMaker<T>::Rows made;
        for (int i = 0; i < rows; ++i) made.key[i] = shared.keys[row - begin + i];
        return made;
      };
      take<T>(block, make, begin, begin + count, taken, maker.b.picks + s.pick, shared.found.warps);
    });
    if (maker.keys.kind == Keys::kSketch)
      add_sum(block, scores, shared.warps, &maker.b.energy->total);
  }

  // f(begin, count) with the keys of rows [begin, begin + count) in shared memory, where they may
  // be already.
  template <class Block, class F>
  ARC_TOPK_DEVICE void for_keys(Block& block, Shared& shared, int64_t segment, int64_t rows,
                                bool fresh, const F& f) const {
    for (int64_t begin = 0; begin < rows; begin += kCached) {
      const int64_t end = smaller(begin + kCached, rows);
      block.sync();
      if (fresh || rows > kCached) maker.fill(block, segment, begin, end, shared.keys);
      block.sync();
      f(begin, end - begin);
    }
    block.sync();
  }
};

}  // namespace arc_topk::cuda
