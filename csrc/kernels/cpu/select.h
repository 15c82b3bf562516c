// The K largest of m keys, without sorting.
//
// 1. A sample tells between which two keys the K-th largest is, very likely: some percent of all
// keys lie there. Where there are few keys, or it was wrong, 3. is of all of them.
//
// 2. One pass counts the keys above and copies those between.
//
// 3. Radix selection among these: counted by their leading 11 bits, from the largest bin down,
// until K is reached; again for the next 11 bits of the keys within that bin, until all bits of the
// threshold are known. It is the smallest key that is kept.
//
// 4. One pass in order of index takes what is above the threshold, and as many equal keys as are
// left: of equal keys the smaller index wins.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/streamed.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// The bits of `data` that count.
template <class Key>
struct MaskedKeys {
  const Key* data;
  Key mask;
  int64_t count;

  Key operator[](int64_t i) const { return data[i] & mask; }
};

template <class Key>
struct Threshold {
  Key key;
  int64_t equal;  // how many keys equal to it are kept
};

// Of keys whose bits but for the last `unknown` ones are those of `known`.
template <class Key>
inline Threshold<Key> find_threshold(const MaskedKeys<Key>& keys, int64_t kept, Key known = 0,
                                     int unknown = 8 * sizeof(Key)) {
  constexpr int kDigitBits = 11;
  constexpr int kBins = 1 << kDigitBits;
  int64_t left = kept;
  for (int shift = unknown; shift > 0;) {
    const int bits = std::min(kDigitBits, shift);
    const Key above = shift < static_cast<int>(8 * sizeof(Key)) ? ~Key{0} << shift : 0;
    shift -= bits;
    const Key digit = (Key{1} << bits) - 1;
    int32_t bins[kBins] = {};
    for (int64_t i = 0; i < keys.count; ++i) {
      if ((keys[i] & above) == known) ++bins[(keys[i] >> shift) & digit];
    }
    auto bin = static_cast<int64_t>(digit);
    for (; bins[bin] < left; --bin) left -= bins[bin];
    known |= static_cast<Key>(bin) << shift;
  }
  return {known, left};
}

// --- passes over all keys
// -------------------------------------------------------------------------

// How many are above `high`; those from `low` up to it into between[], as long as `room` for a
// register more is left.
template <class Key>
struct Split {
  int64_t above = 0;
  int64_t between = 0;
};

template <class Key>
inline bool split_some(const MaskedKeys<Key>& keys, int64_t from, Key low, Key high, Key* between,
                       int64_t room, Split<Key>& split) {
  for (int64_t i = from; i < keys.count; ++i) {
    const Key key = keys[i];
    split.above += key > high;
    if (split.between == room) return false;
    between[split.between] = key;
    split.between += key >= low && key <= high;
  }
  return true;
}

// Writes the index of every key above the threshold and of the first `equal` that are equal to it.
template <class Key>
inline void take_some(const MaskedKeys<Key>& keys, int64_t from, int64_t end,
                      const Threshold<Key>& threshold, int64_t kept, int64_t& equal, int64_t& found,
                      int32_t* picks) {
  for (int64_t i = from; i < end && found < kept; ++i) {
    picks[found] = static_cast<int32_t>(i);
    bool take = keys[i] > threshold.key;
    if (keys[i] == threshold.key) take = equal-- > 0;
    found += take;
  }
}

constexpr int64_t kAhead = 2048;  // bytes that a pass asks for ahead of time

#if defined(__AVX512F__)
constexpr int64_t kKeysAtOnce = 16;

inline int64_t split_registers(const MaskedKeys<uint32_t> keys, uint32_t low, uint32_t high,
                               uint32_t* between, int64_t room, Split<uint32_t>& split) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(keys.mask));
  const __m512i lows = _mm512_set1_epi32(static_cast<int>(low));
  const __m512i highs = _mm512_set1_epi32(static_cast<int>(high));
  int64_t i = 0;
  for (; i + kKeysAtOnce <= keys.count && split.between + kKeysAtOnce <= room; i += kKeysAtOnce) {
    prefetch(keys.data + i, kAhead);
    const __m512i x = _mm512_and_si512(_mm512_loadu_si512(keys.data + i), mask);
    const __mmask16 above = _mm512_cmpgt_epu32_mask(x, highs);
    const auto in = static_cast<__mmask16>(_mm512_cmpge_epu32_mask(x, lows) & ~above);
    split.above += __builtin_popcount(above);
    _mm512_storeu_si512(between + split.between, _mm512_maskz_compress_epi32(in, x));
    split.between += __builtin_popcount(in);
  }
  return i;
}

inline int64_t take_registers(const MaskedKeys<uint32_t> keys, const Threshold<uint32_t>& threshold,
                              int64_t kept, int64_t& equal, int64_t& found, int32_t* picks) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(keys.mask));
  const __m512i key = _mm512_set1_epi32(static_cast<int>(threshold.key));
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t i = 0;
  for (; i + kKeysAtOnce <= keys.count && found + kKeysAtOnce <= kept; i += kKeysAtOnce) {
    prefetch(keys.data + i, kAhead);
    const __m512i x = _mm512_and_si512(_mm512_loadu_si512(keys.data + i), mask);
    if (_mm512_cmpeq_epi32_mask(x, key) != 0) {
      take_some(keys, i, i + kKeysAtOnce, threshold, kept, equal, found, picks);
    } else {
      const __mmask16 take = _mm512_cmpgt_epu32_mask(x, key);
      _mm512_storeu_si512(picks + found, _mm512_maskz_compress_epi32(take, index));
      found += __builtin_popcount(take);
    }
    index = _mm512_add_epi32(index, _mm512_set1_epi32(kKeysAtOnce));
  }
  return i;
}
#elif defined(__AVX2__)
constexpr int64_t kKeysAtOnce = 8;

// For every set of lanes, their numbers, one after the other, as bytes.
struct Lefts {
  uint64_t of[256];
};
constexpr Lefts lefts() {
  Lefts all{};
  for (uint64_t set = 0; set < 256; ++set) {
    int at = 0;
    for (uint64_t lane = 0; lane < 8; ++lane) {
      if ((set >> lane & 1) != 0) all.of[set] |= lane << 8 * at++;
    }
  }
  return all;
}
inline constexpr Lefts kLefts = lefts();

inline __m256i compressed(__m256i x, unsigned set) {
  const __m256i lanes =
      _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kLefts.of[set])));
  return _mm256_permutevar8x32_epi32(x, lanes);
}

inline unsigned lanes_of(__m256i x) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(x)));
}

// Comparisons are of signed numbers only: the order of unsigned ones with their first bit turned.
inline __m256i turned(__m256i x) { return _mm256_xor_si256(x, _mm256_set1_epi32(INT32_MIN)); }
inline __m256i load_turned(const MaskedKeys<uint32_t>& keys, int64_t i) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys.data + i));
  return turned(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(keys.mask))));
}

inline int64_t split_registers(const MaskedKeys<uint32_t> keys, uint32_t low, uint32_t high,
                               uint32_t* between, int64_t room, Split<uint32_t>& split) {
  const __m256i lows = turned(_mm256_set1_epi32(static_cast<int>(low)));
  const __m256i highs = turned(_mm256_set1_epi32(static_cast<int>(high)));
  int64_t i = 0;
  for (; i + kKeysAtOnce <= keys.count && split.between + kKeysAtOnce <= room; i += kKeysAtOnce) {
    prefetch(keys.data + i, kAhead);
    const __m256i x = load_turned(keys, i);
    const unsigned above = lanes_of(_mm256_cmpgt_epi32(x, highs));
    const unsigned in = ~(above | lanes_of(_mm256_cmpgt_epi32(lows, x))) & 0xFF;
    split.above += __builtin_popcount(above);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(between + split.between),
                        compressed(turned(x), in));
    split.between += __builtin_popcount(in);
  }
  return i;
}

inline int64_t take_registers(const MaskedKeys<uint32_t> keys, const Threshold<uint32_t>& threshold,
                              int64_t kept, int64_t& equal, int64_t& found, int32_t* picks) {
  const __m256i key = turned(_mm256_set1_epi32(static_cast<int>(threshold.key)));
  __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  int64_t i = 0;
  for (; i + kKeysAtOnce <= keys.count && found + kKeysAtOnce <= kept; i += kKeysAtOnce) {
    prefetch(keys.data + i, kAhead);
    const __m256i x = load_turned(keys, i);
    if (lanes_of(_mm256_cmpeq_epi32(x, key)) != 0) {
      take_some(keys, i, i + kKeysAtOnce, threshold, kept, equal, found, picks);
    } else {
      const unsigned take = lanes_of(_mm256_cmpgt_epi32(x, key));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(picks + found), compressed(index, take));
      found += __builtin_popcount(take);
    }
    index = _mm256_add_epi32(index, _mm256_set1_epi32(kKeysAtOnce));
  }
  return i;
}
#endif

template <class Key>
inline bool split(const MaskedKeys<Key>& keys, Key low, Key high, Key* between, int64_t room,
                  Split<Key>& found) {
  int64_t from = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(Key) == 4) from = split_registers(keys, low, high, between, room, found);
#endif
  return split_some(keys, from, low, high, between, room, found);
}

template <class Key>
inline void take(const MaskedKeys<Key>& keys, const Threshold<Key>& threshold, int64_t kept,
                 int32_t* picks) {
  int64_t from = 0, found = 0, equal = threshold.equal;
#if defined(__AVX2__)
  if constexpr (sizeof(Key) == 4) from = take_registers(keys, threshold, kept, equal, found, picks);
#endif
  take_some(keys, from, keys.count, threshold, kept, equal, found, picks);
}

// --- the threshold
// --------------------------------------------------------------------------------

// One key of every stretch, from another place in each: rows of equal width have no part in it.
constexpr int64_t kMostSamples = 4096;
template <class Key>
inline int64_t sample(const MaskedKeys<Key>& keys, Key* samples) {
  constexpr int64_t kStretch = 192;
  const int64_t number = std::clamp<int64_t>(keys.count / kStretch, 512, kMostSamples);
  uint64_t chance = 1;
  for (int64_t i = 0; i < number; ++i) {
    const int64_t begin = i * keys.count / number;
    const int64_t end = (i + 1) * keys.count / number;
    chance = chance * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
    samples[i] =
        keys[begin + static_cast<int64_t>((chance >> 33) % static_cast<uint64_t>(end - begin))];
  }
  return number;
}

// By a sample; false where that has not worked out, or there is no room.
template <class Key>
inline bool find_by_sample(const MaskedKeys<Key>& keys, int64_t kept, Key* spare, int64_t room,
                           Threshold<Key>& threshold) {
  constexpr int64_t kFew = 16384;
  if (keys.count < kFew || room < keys.count / 8) return false;
  Key samples[kMostSamples];
  const int64_t number = sample(keys, samples);
  const MaskedKeys<Key> sampled{samples, ~Key{0}, number};
  const double share = static_cast<double>(kept) / static_cast<double>(keys.count);
  const double rank = share * static_cast<double>(number);
  const double margin = 3.5 * std::sqrt(rank * (1 - share)) + 2;
  const auto upper = static_cast<int64_t>(rank - margin);
  const auto lower = static_cast<int64_t>(rank + margin) + 1;
  const Key high = upper < 1 ? ~Key{0} : find_threshold(sampled, upper).key;
  const Key low = lower > number ? Key{0} : find_threshold(sampled, lower).key;
  Split<Key> found;
  if (!split(keys, low, high, spare, room, found)) return false;
  const int64_t left = kept - found.above;
  if (left < 1 || left > found.between) return false;
  const int unknown = static_cast<int>(std::bit_width(static_cast<Key>(low ^ high)));
  const Key known = unknown < static_cast<int>(8 * sizeof(Key)) ? high >> unknown << unknown : 0;
  const MaskedKeys<Key> between{spare, ~Key{0}, found.between};
  threshold = find_threshold(between, left, known, unknown);
  return true;
}

// Writes the indices of the `kept` largest keys in ascending order. `spare`: room for as many keys,
// of which nothing is kept; more of it is faster.
template <class Key>
inline void select_largest(const Key* data, Key mask, int64_t count, int64_t kept, Key* spare,
                           int64_t room, int32_t* picks) {
  const MaskedKeys<Key> keys{data, mask, count};
  Threshold<Key> threshold;
  if (!find_by_sample(keys, kept, spare, room, threshold)) threshold = find_threshold(keys, kept);
  take(keys, threshold, kept, picks);
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
