#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cpu_against_loops.h"

namespace arc_topk::cpu {
namespace {

using ::arc_topk::testing::all_tables;

// Sorts by key, largest first, equal keys by index; then the first K by index.
template <class Key>
std::vector<int32_t> expected(const std::vector<Key>& keys, int64_t kept) {
  std::vector<int32_t> index(keys.size());
  std::iota(index.begin(), index.end(), 0);
  std::stable_sort(index.begin(), index.end(),
                   [&](int32_t a, int32_t b) { return keys[a] > keys[b]; });
  index.resize(kept);
  std::sort(index.begin(), index.end());
  return index;
}

template <class Key>
void check(const std::vector<Key>& keys, int64_t kept) {
  const auto count = static_cast<int64_t>(keys.size());
  const std::vector<int32_t> right = expected(keys, kept);
  for (const Rows* table : all_tables()) {
    for (const int64_t room : {int64_t{0}, count / 4, count}) {
      std::vector<Key> spare(static_cast<size_t>(room) + 1, Key{7});
      std::vector<int32_t> picks(kept + 1, -7);
      if constexpr (sizeof(Key) == 4) {
        table->select32(keys.data(), ~Key{0}, count, kept, spare.data(), room, picks.data());
      } else {
        table->select64(keys.data(), ~Key{0}, count, kept, spare.data(), room, picks.data());
      }
      EXPECT_EQ(picks.back(), -7) << "wrote beyond K";
      EXPECT_EQ(spare.back(), Key{7}) << "wrote beyond its room";
      picks.pop_back();
      EXPECT_EQ(picks, right) << table->isa << ", m = " << count << ", K = " << kept;
    }
  }
}

template <class Key>
void check_all_counts(const std::vector<Key>& keys) {
  const auto count = static_cast<int64_t>(keys.size());
  for (int64_t kept : {int64_t{1}, (count + 9) / 10, (count + 1) / 2, count - 1, count}) {
    if (kept >= 1) check(keys, kept);
  }
}

template <class Key>
class Select : public ::testing::Test {};
using KeyTypes = ::testing::Types<uint32_t, uint64_t>;
TYPED_TEST_SUITE(Select, KeyTypes);

TYPED_TEST(Select, UniformKeys) {
  std::mt19937_64 random(1);
  for (int64_t count : {1, 2, 7, 31, 1000, 40000}) {
    std::vector<TypeParam> keys(count);
    for (TypeParam& key : keys) key = static_cast<TypeParam>(random());
    check_all_counts(keys);
  }
}

TYPED_TEST(Select, ManyTies) {
  std::mt19937 random(2);
  for (int distinct : {1, 2, 5}) {
    std::vector<TypeParam> keys(500);
    for (TypeParam& key : keys) key = static_cast<TypeParam>(random() % distinct);
    check_all_counts(keys);
  }
}

TYPED_TEST(Select, KeysThatDifferInOneBit) {
  constexpr int kBits = 8 * sizeof(TypeParam);
  std::vector<TypeParam> keys = {0, ~TypeParam{0}, 0, ~TypeParam{0}};
  for (int bit = 0; bit < kBits; ++bit) {
    keys.push_back(TypeParam{1} << bit);
    keys.push_back(~(TypeParam{1} << bit));
  }
  for (int64_t kept = 1; kept <= static_cast<int64_t>(keys.size()); ++kept) check(keys, kept);
}

TEST(SelectScores, NaNAndInfinityAreTheLargest) {
  std::vector<uint32_t> keys;
  for (float score : {1.0f, std::numeric_limits<float>::quiet_NaN(), 0.0f, 3e38f,
                      std::numeric_limits<float>::infinity(), 1e-40f}) {
    keys.push_back(std::bit_cast<uint32_t>(score));
  }
  for (const Rows* table : all_tables()) {
    std::vector<int32_t> picks(3);
    table->select32(keys.data(), ~0u, 6, 3, nullptr, 0, picks.data());
    EXPECT_EQ(picks, (std::vector<int32_t>{1, 3, 4}));
  }
}

// Long enough for the work to be shared between threads.
TEST(SelectScores, ManyKeys) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<uint32_t> keys(600000);
  for (uint32_t& key : keys) key = std::bit_cast<uint32_t>(std::abs(normal(random)));
  for (size_t i = 0; i < keys.size(); i += 3) keys[i] = keys[0];
  check(keys, 60000);
  check(keys, 250000);
}

// Signs are no part of a number's key.
TEST(SelectScores, BitsThatAreMaskedDoNotCount) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<uint32_t> signed_keys(40000), keys(40000);
  for (size_t i = 0; i < keys.size(); ++i) {
    signed_keys[i] = std::bit_cast<uint32_t>(normal(random));
    keys[i] = signed_keys[i] & 0x7FFFFFFF;
  }
  for (const Rows* table : all_tables()) {
    std::vector<uint32_t> spare(keys.size());
    std::vector<int32_t> picks(4000);
    table->select32(signed_keys.data(), 0x7FFFFFFF, 40000, 4000, spare.data(), 40000, picks.data());
    EXPECT_EQ(picks, expected(keys, 4000)) << table->isa;
  }
}

// What a sample tells of the middle is wrong: half of the keys are one, and rare ones far apart.
TEST(SelectScores, KeysThatASampleSaysLittleOf) {
  std::vector<uint32_t> keys(50000, 5);
  for (size_t i = 0; i < keys.size(); i += 5000) keys[i] = static_cast<uint32_t>(1000 + i);
  for (size_t i = 25000; i < 25100; ++i) keys[i] = static_cast<uint32_t>(7 + i % 3);
  for (const int64_t kept : {1, 9, 10, 11, 50, 110, 111, 49999}) check(keys, kept);
}

}  // namespace
}  // namespace arc_topk::cpu
