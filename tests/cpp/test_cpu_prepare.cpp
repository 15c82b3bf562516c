// prepare() and settle(): state, sketches and dense copies of one step.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "cpu_against_loops.h"

namespace arc_topk::testing {
namespace {

bool none_of_it(const unsigned char* marks, int64_t count) {
  return std::all_of(marks, marks + count, [](unsigned char mark) { return mark == 0; });
}

// What prepare() should put into the first payload for one row.
void expect_sketch(const BucketInMemory& x, const Segment& s, int64_t row, const Projection& v,
                   const std::vector<double>& message) {
  const double epsilon = x.b.gradient_type == kF64 ? 2e-16 : 1e-7;
  for (int64_t k = 0; k < x.b.sketch_dim; ++k) {
    double sum = 0, size = 0;
    for (size_t c = 0; c < message.size(); ++c) {
      const double product = message[c] * v.data[k * v.stride + static_cast<int64_t>(c)];
      sum += product;
      size += std::abs(product);
    }
    const double root = std::sqrt(static_cast<double>(x.b.sketch_dim));
    ASSERT_NEAR(x.first(s.sketch + row * x.b.sketch_dim + k), sum / root,
                epsilon * size * (4 + std::sqrt(static_cast<double>(message.size()))))
        << "row " << row << " of " << s.cols << " columns, k = " << k;
  }
}

void check_prepared(const BucketInMemory& x, const Projection* v, std::vector<Element> before) {
  const Scalar scalar(x.b);
  for (size_t index = 0; index < x.segments.size(); ++index) {
    const Segment& s = x.segments[index];
    if (!s.compressed()) {
      for (int64_t i = 0; i < s.numel; ++i) {
        const double g = x.gradient(s.offset + i);
        const double copy = s.dense_in_first ? x.first(s.packed + i) : x.second(s.packed + i);
        const double scaled = scalar.w(g * x.b.wire_scale);
        ASSERT_EQ(copy, s.dense_in_first ? scaled : rounded(x.b.wire_type, scaled));
        expect_state(x, s.offset + i, before[s.offset + i]);
      }
      continue;
    }
    for (int64_t row = 0; row < s.rows; ++row) {
      std::vector<double> message;
      for (int64_t i = row * s.cols; i < std::min(s.numel, (row + 1) * s.cols); ++i) {
        Element e = before[s.offset + i];
        message.push_back(scalar.prepare(e));
        expect_state(x, s.offset + i, x.b.used[index] ? e : before[s.offset + i]);
      }
      if (v != nullptr) expect_sketch(x, s, row, *v, message);
    }
  }
}

TEST(CpuPrepare, UpdatesTheStateAndSketches) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    const Projection v = x.projection();
    const std::vector<Element> before = elements(x);
    kernels.update(x.b, &v);
    check_prepared(x, &v, before);
    EXPECT_TRUE(none_of_it(x.b.bad, x.b.num_segments));
  });
}

TEST(CpuPrepare, WithoutASketch) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    const std::vector<Element> before = elements(x);
    kernels.update(x.b, nullptr);
    check_prepared(x, nullptr, before);
  });
}

TEST(CpuPrepare, AnySketchDimension) {
  for (int64_t dim : {1, 2, 3, 4, 5, 7, 64}) {
    for (DType type : {kF32, kF64}) {
      for (const cpu::Rows* table : all_tables()) {
        BucketSpec spec;
        spec.tensors = odd_tensors();
        spec.feedback = FeedbackKind::kEF14;
        spec.gradient = spec.state = type;
        spec.sketch_dim = dim;
        BucketInMemory x(spec);
        const Projection v = x.projection();
        const std::vector<Element> before = elements(x);
        cpu::kernels_with(*table).prepare(x.b, &v);
        check_prepared(x, &v, before);
      }
    }
  }
}

// Without a gradient here, another rank may have one: the message is sketched, settle() decides.
TEST(CpuPrepare, HoldsBackWhatIsUnusedHere) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    const Projection v = x.projection();
    for (int64_t i = 0; i < x.b.num_segments; i += 2) {
      const Segment& s = x.segments[i];
      if (s.compressed()) x.b.used[i] = 0;
      for (int64_t j = 0; j < s.numel; ++j) x.set_gradient(s.offset + j, 0);
    }
    const std::vector<Element> before = elements(x);
    kernels.update(x.b, &v);
    check_prepared(x, &v, before);

    // Some other rank used the tensors of even number that are divisible by four, nobody the rest.
    for (int64_t i = 0; i < x.b.num_segments; ++i) {
      x.b.outcome[i] = x.b.used[i] || i % 4 == 0 ? Outcome::kNormal : Outcome::kUnused;
    }
    kernels.settle(x.b);
    const Scalar scalar(x.b);
    for (int64_t index = 0; index < x.b.num_segments; ++index) {
      const Segment& s = x.segments[index];
      for (int64_t i = s.offset; i < s.offset + s.numel; ++i) {
        Element e = before[i];
        if (s.compressed() && x.b.outcome[index] == Outcome::kNormal) scalar.prepare(e);
        expect_state(x, i, e);
      }
    }
  });
}

TEST(CpuPrepare, NeverStoresANonFiniteStateAndSettleTakesTheRestBack) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    const Projection v = x.projection();
    const double values[] = {NAN, kInf, -kInf};
    for (int64_t i = 0; i < x.b.num_segments; ++i) {
      const Segment& s = x.segments[i];
      if (i % 2 == 0 && s.numel > 0) x.set_gradient(s.offset + s.numel - 1, values[i / 2 % 3]);
    }
    const std::vector<Element> before = elements(x);
    kernels.update(x.b, &v);
    for (int64_t i = 0; i < x.b.num_segments; ++i) {
      const Segment& s = x.segments[i];
      EXPECT_EQ(x.b.bad[i], s.compressed() && i % 2 == 0) << "segment " << i;
      x.b.outcome[i] = x.b.bad[i] ? Outcome::kNonFinite : Outcome::kNormal;
      for (int64_t j = s.offset; j < s.offset + s.numel; ++j) {
        ASSERT_TRUE(std::isfinite(x.own_a(j)) && std::isfinite(x.own_b(j))) << "segment " << i;
      }
    }
    kernels.settle(x.b);
    const double unit = x.b.state_type == kBF16  ? 1.0 / 256
                        : x.b.state_type == kF32 ? 6e-8
                                                 : 1.2e-16;
    const double tolerance = 4 * unit * 8 / (1 - x.b.eta);  // no number here is larger than 8
    for (int64_t i = 0; i < x.b.num_segments; ++i) {
      if (!x.b.bad[i]) continue;
      const Segment& s = x.segments[i];
      for (int64_t j = s.offset; j < s.offset + s.numel; ++j) {
        const bool last = j == s.offset + s.numel - 1;
        ASSERT_NEAR(x.own_a(j), before[j].a, last ? 0 : tolerance);
        ASSERT_EQ(x.own_b(j), before[j].b);
      }
    }
  });
}

// Finite gradient, finite state, but their sum is not.
TEST(CpuPrepare, OverflowIsNonFinite) {
  for (const cpu::Rows* table : all_tables()) {
    BucketSpec spec;
    spec.tensors = {{20, 5, 2}};
    spec.feedback = FeedbackKind::kEF14;
    BucketInMemory x(spec);
    static_cast<float*>(x.b.own_a)[3] = 3e38f;
    x.set_gradient(3, 3e38);
    cpu::kernels_with(*table).prepare(x.b, nullptr);
    EXPECT_EQ(x.b.bad[0], 1);
    EXPECT_EQ(x.own_a(3), 3e38f);
    x.b.outcome[0] = Outcome::kNonFinite;
    cpu::kernels_with(*table).settle(x.b);
    EXPECT_EQ(x.own_a(3), 3e38f);
  }
}

// Rows that AVX-512 forms and sketches in one loop, one or four at a time: the loops of the other
// tables, one after the other, must give the same.
std::vector<BucketSpec> long_rows(FeedbackKind feedback) {
  std::vector<BucketSpec> all;
  for (DType type : {kF32, kF64}) {
    for (int64_t dim : {1, 3, 4, 6, 8}) {
      BucketSpec spec;
      spec.tensors = {{9 * 1100 + 40, 1100, 3},  // twice four rows, one, and the start of another
                      {8 * 1040, 1040, 2},       // no tail
                      {5 * 2051 - 1, 2051, 2},   // the last row without the last column
                      {12 * 31, 31, 4},          // too short for it
                      {12 * 32, 32, 4},          // just long enough
                      {7 * 45 + 1, 45, 4},       // one element in the last row
                      {6 * 512 - 500, 512, 2}};
      spec.feedback = feedback;
      spec.gradient = spec.state = spec.wire = type;
      spec.sketch_dim = dim;
      spec.piece_numel = 1 << 20;
      all.push_back(spec);
    }
  }
  return all;
}

TEST(CpuPrepare, FusedLoopGivesTheSameBits) {
  for (FeedbackKind feedback : kAllFeedback) {
    for (const BucketSpec& spec : long_rows(feedback)) {
      std::vector<std::vector<unsigned char>> baseline;
      for (const cpu::Rows* table : all_tables()) {
        SCOPED_TRACE(describe(*table, spec));
        BucketInMemory x(spec);
        const Projection v = x.projection();
        cpu::kernels_with(*table).prepare(x.b, &v);
        EXPECT_TRUE(none_of_it(x.b.bad, x.b.num_segments));
        if (baseline.empty()) baseline = x.contents();
        ASSERT_EQ(x.contents(), baseline);
      }
    }
  }
}

TEST(CpuPrepare, FusedLoopNeverStoresANonFiniteState) {
  for (FeedbackKind feedback : kAllFeedback) {
    for (const BucketSpec& spec : long_rows(feedback)) {
      for (const cpu::Rows* table : all_tables()) {
        SCOPED_TRACE(describe(*table, spec));
        BucketInMemory x(spec);
        BucketInMemory finite(spec);
        const std::vector<Element> before = elements(x);
        std::vector<bool> is_bad(before.size());
        const auto spoil = [&](const Segment& s, int64_t i, double value) {
          x.set_gradient(s.offset + i, value);
          is_bad[static_cast<size_t>(s.offset + i)] = true;
        };
        spoil(x.segments[0], 5 * 1100 + 17, NAN);    // a row of four
        spoil(x.segments[1], 8 * 1040 - 1, -kInf);   // the last lane
        spoil(x.segments[2], 3 * 2051 + 2050, NAN);  // the tail of a row of four
        spoil(x.segments[5], 7 * 45, kInf);          // the tail of the last row
        spoil(x.segments[6], 512, NAN);              // the first lane
        const Projection v = x.projection();
        cpu::kernels_with(*table).prepare(x.b, &v);
        cpu::kernels_with(*table).prepare(finite.b, &v);
        const unsigned char bad[] = {1, 1, 1, 0, 0, 1, 1};
        EXPECT_TRUE(std::equal(std::begin(bad), std::end(bad), x.b.bad));
        for (int64_t i = 0; i < x.b.numel; ++i) {
          const bool held = is_bad[static_cast<size_t>(i)];
          expect_state(x, i, held ? before[static_cast<size_t>(i)] : element(finite, i));
        }
      }
    }
  }
}

TEST(CpuPrepare, DenseCopiesAreNotClamped) {
  for (const cpu::Rows* table : all_tables()) {
    BucketSpec spec;
    spec.tensors = {{40, 1, 0, false}};
    spec.wire = kF16;
    spec.wire_scale = 0.25;
    BucketInMemory x(spec);
    x.set_gradient(0, 1e6);
    x.set_gradient(39, -kInf);
    cpu::kernels_with(*table).prepare(x.b, nullptr);
    EXPECT_EQ(x.second(0), kInf);
    EXPECT_EQ(x.second(39), -kInf);
  }
}

}  // namespace
}  // namespace arc_topk::testing
