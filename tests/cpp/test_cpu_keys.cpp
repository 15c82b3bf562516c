// The keys that rows are selected by, and that the largest are picked. The algorithm that finds
// them has its own tests in test_select.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/random.h"
#include "cpu_against_loops.h"

namespace arc_topk::testing {
namespace {

double key(const BucketInMemory& x, int64_t i) {
  return x.b.gradient_type == kF64 ? static_cast<const double*>(x.b.scratch)[i]
                                   : static_cast<const float*>(x.b.scratch)[i];
}

TEST(CpuScore, IsTheSketchsSquaredLength) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    const Scalar scalar(x.b);
    std::fill_n(x.b.outcome, x.b.num_segments, Outcome::kNormal);
    x.b.outcome[4] = Outcome::kUnused;
    x.b.outcome[6] = Outcome::kNonFinite;
    double expected = 0;
    const double total = kernels.score(x.b);
    for (int64_t i = 0; i < x.b.num_segments; ++i) {
      const Segment& s = x.segments[i];
      if (!s.compressed() || x.b.outcome[i] != Outcome::kNormal) continue;
      for (int64_t row = 0; row < s.rows; ++row) {
        double score = 0;
        for (int64_t k = 0; k < x.b.sketch_dim; ++k) {
          const double p =
              scalar.w(x.first(s.sketch + row * x.b.sketch_dim + k) * scalar.w(1.0 / 3));
          score = scalar.w(score + scalar.w(p * p));
        }
        ASSERT_EQ(key(x, s.key + row), score) << "segment " << i << ", row " << row;
        expected += score;
      }
    }
    EXPECT_NEAR(total, expected, 1e-12 * expected);
  });
}

TEST(CpuScore, NonFiniteSketchesStillGiveValidPicks) {
  for (const cpu::Rows* table : all_tables()) {
    BucketSpec spec;
    spec.tensors = {{50 * 8, 8, 5}};
    BucketInMemory x(spec);
    std::fill_n(x.b.outcome, 1, Outcome::kNormal);
    auto* p = static_cast<float*>(x.b.first);
    p[4 * 7] = NAN;
    p[4 * 9 + 1] = -std::numeric_limits<float>::infinity();
    p[4 * 30] = -std::numeric_limits<float>::quiet_NaN();
    cpu::kernels_with(*table).score(x.b);
    cpu::kernels_with(*table).pick(x.b);
    EXPECT_TRUE(is_picked(x, x.segments[0], 7) && is_picked(x, x.segments[0], 9) &&
                is_picked(x, x.segments[0], 30));
    for (int k = 0; k < 5; ++k) {
      EXPECT_GT(x.b.picks[k], k == 0 ? -1 : x.b.picks[k - 1]);
      EXPECT_LT(x.b.picks[k], 50);
    }
  }
}

TEST(CpuRandomize, IsTheGeneratorsWords) {
  for (DType type : {kF32, kF64}) {
    for (const cpu::Rows* table : all_tables()) {
      BucketSpec spec;
      spec.tensors = {{3000, 1, 5}, {31, 7, 2}};
      spec.gradient = spec.state = type;
      spec.piece_numel = 1001;  // pieces begin within a group of four rows
      BucketInMemory x(spec);
      cpu::kernels_with(*table).randomize(x.b, 11, 22);
      for (const Segment& s : x.segments) {
        for (int64_t row = 0; row < s.rows; ++row) {
          const uint32_t word = selection_keys(row / 4, s.stream, 11, 22).word[row % 4];
          if (type == kF64) {
            ASSERT_EQ(static_cast<const uint64_t*>(x.b.scratch)[s.key + row], word) << table->isa;
          } else {
            ASSERT_EQ(static_cast<const uint32_t*>(x.b.scratch)[s.key + row], word) << table->isa;
          }
        }
      }
    }
  }
}

TEST(CpuMagnitudes, AreThoseOfTheMessage) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& same_types) {
    BucketInMemory x(by_element(same_types.spec));
    const Scalar scalar(x.b);
    x.b.used[2] = 0;  // held back: the message that would have been formed
    const std::vector<Element> before = elements(x);
    kernels.update(x.b, nullptr);
    kernels.magnitudes(x.b);
    for (const Segment& s : x.segments) {
      for (int64_t i = 0; s.compressed() && i < s.numel; ++i) {
        Element e = before[s.offset + i];
        ASSERT_EQ(key(x, s.key + i), std::abs(scalar.prepare(e)));
      }
    }
  });
}

TEST(CpuSelect, PicksEverySegmentsLargest) {
  for (DType type : {kF32, kF64}) {
    BucketSpec spec;
    spec.tensors = odd_tensors();
    spec.gradient = spec.state = type;
    BucketInMemory x(spec);
    std::fill_n(x.b.outcome, x.b.num_segments, Outcome::kNormal);
    best().score(x.b);
    best().pick(x.b);
    for (const Segment& s : x.segments) {
      std::vector<double> picked, left;
      for (int64_t row = 0; s.compressed() && row < s.rows; ++row) {
        (is_picked(x, s, row) ? picked : left).push_back(key(x, s.key + row));
      }
      ASSERT_EQ(static_cast<int64_t>(picked.size()), s.kept);
      if (s.kept == 0 || s.kept == s.rows) continue;
      EXPECT_GE(*std::min_element(picked.begin(), picked.end()),
                *std::max_element(left.begin(), left.end()));
    }
  }
}

}  // namespace
}  // namespace arc_topk::testing
