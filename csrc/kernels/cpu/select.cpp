// Radix selection:
//   1. Count the keys by their leading 11 bits, from the largest bin down, until `kept` is reached:
//   the
//      threshold's leading bits are those of that bin.
//   2. Again for the next 11 bits of the keys within that bin, until all bits of the threshold are
//   known.
//      It is the smallest key that is kept.
//   3. One pass in order of index takes what is above the threshold, and as many equal keys as are
//   left.
#include "kernels/cpu/select.h"

#include <algorithm>

namespace arc_topk::cpu {
namespace {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;

template <class Key>
struct Threshold {
  Key key;
  int64_t equal;  // how many keys equal to it are kept
};

template <class Key>
Threshold<Key> find_threshold(const Key* keys, int64_t count, int64_t kept) {
  Key known = 0;  // leading bits found so far
  int64_t left = kept;
  for (int shift = 8 * sizeof(Key); shift > 0;) {
    const int bits = std::min(kDigitBits, shift);
    const Key above = shift < static_cast<int>(8 * sizeof(Key)) ? ~Key{0} << shift : 0;
    shift -= bits;
    const Key digit = (Key{1} << bits) - 1;
    int64_t bins[kBins] = {};
    for (int64_t i = 0; i < count; ++i) {
      if ((keys[i] & above) == known) ++bins[(keys[i] >> shift) & digit];
    }
    auto bin = static_cast<int64_t>(digit);
    for (; bins[bin] < left; --bin) left -= bins[bin];
    known |= static_cast<Key>(bin) << shift;
  }
  return {known, left};
}

}  // namespace

template <class Key>
void select_largest(const Key* keys, int64_t count, int64_t kept, int32_t* picks) {
  const Threshold<Key> threshold = find_threshold(keys, count, kept);
  int64_t equal = threshold.equal;
  int64_t found = 0;
  for (int64_t i = 0; found < kept; ++i) {
    picks[found] = static_cast<int32_t>(i);
    bool take = keys[i] > threshold.key;
    if (keys[i] == threshold.key) take = equal-- > 0;
    found += take;
  }
}

template void select_largest(const uint32_t*, int64_t, int64_t, int32_t*);
template void select_largest(const uint64_t*, int64_t, int64_t, int32_t*);

}  // namespace arc_topk::cpu
