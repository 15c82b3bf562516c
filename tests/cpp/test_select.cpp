#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cpu/select.h"

namespace arc_topk::cpu {
namespace {

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
  std::vector<int32_t> picks(kept + 1, -7);
  select_largest(keys.data(), count, kept, picks.data());
  EXPECT_EQ(picks.back(), -7) << "wrote beyond K";
  picks.pop_back();
  EXPECT_EQ(picks, expected(keys, kept)) << "m = " << count << ", K = " << kept;
}

template <class Key>
void check_all_counts(const std::vector<Key>& keys) {
  const auto count = static_cast<int64_t>(keys.size());
  for (int64_t kept : {int64_t{1}, (count + 9) / 10, (count + 1) / 2, count - 1, count}) {
    if (kept >= 1) check(keys, kept);
  }
}

template <class Key>
class Select : public testing::Test {};
using Keys = testing::Types<uint32_t, uint64_t>;
TYPED_TEST_SUITE(Select, Keys);

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
  std::vector<int32_t> picks(3);
  select_largest(keys.data(), 6, 3, picks.data());
  EXPECT_EQ(picks, (std::vector<int32_t>{1, 3, 4}));
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

}  // namespace
}  // namespace arc_topk::cpu
