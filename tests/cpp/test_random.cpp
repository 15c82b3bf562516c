#include <gtest/gtest.h>

#include <cmath>

#include "base/random.h"

namespace arc_topk {
namespace {

void expect_words(const Philox& block, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  EXPECT_EQ(block.word[0], a);
  EXPECT_EQ(block.word[1], b);
  EXPECT_EQ(block.word[2], c);
  EXPECT_EQ(block.word[3], d);
}

// From the Random123 library's known-answer file.
TEST(Philox, KnownAnswers) {
  expect_words(philox(0, 0, 0, 0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8);
  expect_words(philox(~0u, ~0u, ~0u, ~0u, ~0u, ~0u), 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
               0x6d5451fd);
  expect_words(philox(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0),
               0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1);
}

TEST(Philox, SeedAndStepInBothHalvesMatter) {
  const Philox base = selection_keys(5, 6, 7, 8);
  for (const Philox& other :
       {selection_keys(4, 6, 7, 8), selection_keys(5, 7, 7, 8),
        selection_keys(5, 6, 7 | 1ull << 40, 8), selection_keys(5, 6, 9, 8),
        selection_keys(5, 6, 7, 9), selection_keys(5, 6, 7, 8 | 1ull << 40)}) {
    EXPECT_NE(base.word[0], other.word[0]);
  }
}

double relative_error(double value, double expected) {
  return std::abs(value - expected) / std::abs(expected);
}

// Every 1009th of the 2^24 arguments, and those where a careless formula loses digits.
TEST(Normals, LogarithmIsAccurate) {
  const auto check = [](uint32_t n) {
    EXPECT_LT(relative_error(exact::log_of_24_bits(n), std::log(n / 16777216.0)), 2e-7) << n;
  };
  for (uint32_t n = 1; n < (1u << 24); n += 1009) check(n);
  for (uint32_t n = (1u << 24) - 100; n < (1u << 24); ++n) check(n);
  EXPECT_EQ(exact::log_of_24_bits(1u << 24), 0.0f);
}

TEST(Normals, SineAndCosineAreAccurate) {
  constexpr uint32_t kQuarter = 1u << 22;
  const auto check = [](uint32_t n) {
    const double angle = 2 * M_PI * (n / 16777216.0);
    const exact::Direction turn = exact::turn_of_24_bits(n);
    EXPECT_LT(relative_error(turn.cosine, std::cos(angle)), 3e-7) << n;
    EXPECT_LT(relative_error(turn.sine, std::sin(angle)), 3e-7) << n;
  };
  for (uint32_t n = 1; n < (1u << 24); n += 1009) {
    if (n % kQuarter != 0) check(n);
  }
  for (uint32_t quarter = 0; quarter < 4; ++quarter) {
    check(quarter * kQuarter + 1);
    check((quarter + 1) * kQuarter - 1);
    const exact::Direction turn = exact::turn_of_24_bits(quarter * kQuarter);
    EXPECT_EQ(turn.cosine, quarter == 0 ? 1.0f : quarter == 2 ? -1.0f : 0.0f);
    EXPECT_EQ(turn.sine, quarter == 1 ? 1.0f : quarter == 3 ? -1.0f : 0.0f);
  }
}

TEST(Normals, AreBoxAndMullersOfTheBlock) {
  const Philox block = philox(1, 2, 3, 4, 5, 6);
  const Normals four = normals(block);
  for (int pair = 0; pair < 2; ++pair) {
    const double u1 = ((block.word[2 * pair] >> 8) + 1) / 16777216.0;
    const double u2 = (block.word[2 * pair + 1] >> 8) / 16777216.0;
    const double radius = std::sqrt(-2 * std::log(u1));
    EXPECT_LT(relative_error(four.z[2 * pair], radius * std::cos(2 * M_PI * u2)), 1e-6);
    EXPECT_LT(relative_error(four.z[2 * pair + 1], radius * std::sin(2 * M_PI * u2)), 1e-6);
  }
}

// Moments of 400,000 numbers, and of products of neighbours: five standard deviations.
TEST(Normals, HaveTheMomentsOfNormalNumbers) {
  constexpr int kBlocks = 100000;
  double sum[4] = {};
  double products[3] = {};
  for (uint32_t row = 0; row < kBlocks; ++row) {
    const Normals four = projection_normals(row, 0, 123, 45);
    for (double z : four.z) {
      double power = 1;
      for (double& s : sum) s += power *= z;
    }
    for (int j = 0; j < 3; ++j) products[j] += double{four.z[j]} * four.z[j + 1];
  }
  const double n = 4.0 * kBlocks;
  EXPECT_NEAR(sum[0] / n, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(sum[1] / n, 1, 5 * std::sqrt(2 / n));
  EXPECT_NEAR(sum[2] / n, 0, 5 * std::sqrt(15 / n));
  EXPECT_NEAR(sum[3] / n, 3, 5 * std::sqrt(96 / n));
  for (double product : products) EXPECT_NEAR(product / kBlocks, 0, 5 / std::sqrt(kBlocks));
}

}  // namespace
}  // namespace arc_topk
