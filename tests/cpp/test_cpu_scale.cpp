// A scaled loss: the gradient and the result are so many times larger, and nothing else is; and
// reclaim(), what a skipped step has sent.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu_against_loops.h"

namespace arc_topk::testing {
namespace {

constexpr double kScale = 8;  // all numbers keep their bits but for the exponent

BucketSpec scaled(BucketSpec spec) {
  spec.loss_scale = kScale;
  return spec;
}

void scale_gradient(const BucketInMemory& from, BucketInMemory& to, double factor) {
  for (int64_t i = 0; i < from.b.numel; ++i) to.set_gradient(i, from.gradient(i) * factor);
}

void expect_same_state(const BucketInMemory& x, const BucketInMemory& y) {
  for (int64_t i = 0; i < x.b.numel; ++i) {
    ASSERT_EQ(x.own_a(i), y.own_a(i)) << i;
    ASSERT_EQ(x.own_b(i), y.own_b(i)) << i;
    if (x.b.shared != nullptr) {
      ASSERT_EQ(x.shared(i), y.shared(i)) << i;
    }
  }
}

// A bucket's step, and the same with a scaled loss.
TEST(CpuScale, IsOfGradientsAndResultsAlone) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    BucketInMemory y(scaled(x.spec));
    for (BucketInMemory* one : {&x, &y}) one->refill(3);
    scale_gradient(x, y, kScale);
    for (BucketInMemory* one : {&x, &y}) {
      const Projection v = one->projection();
      kernels.prepare(one->b, &v);
      kernels.select(one->b, {Keys::kSketch});
      kernels.pack_and_commit(one->b);
    }
    expect_same_state(x, y);
    for (const Segment& s : x.segments) {
      if (!s.compressed()) continue;
      for (int64_t i = 0; i < s.rows * x.b.sketch_dim; ++i)
        ASSERT_EQ(x.first(s.sketch + i), y.first(s.sketch + i));
      for (int64_t i = 0; i < s.kept * s.cols; ++i)
        ASSERT_EQ(x.second(s.packed + i), y.second(s.packed + i));
    }
    for (BucketInMemory* one : {&x, &y}) {
      kernels.apply(one->b, nullptr);
      if (shares_estimate(one->b.feedback)) {
        one->b.result_in_gradient = true;
        kernels.publish(one->b);
      }
    }
    expect_same_state(x, y);
    EXPECT_EQ(x.energy.captured, y.energy.captured);
    for (int64_t i = 0; i < x.b.numel; ++i) {
      // float16 has fewer digits below that.
      if (x.b.gradient_type == kF16 && std::abs(x.gradient(i)) < 1e-4) continue;
      ASSERT_EQ(x.gradient(i) * kScale, y.gradient(i)) << i;
    }
  });
}

// The estimate is at another scale than the result, and must not be handed out for it.
TEST(CpuScale, TheEstimateIsNotTheResult) {
  BucketSpec spec;
  spec.tensors = {{40, 20, 1}};
  spec.feedback = FeedbackKind::kEF21;
  for (const bool has_scale : {false, true}) {
    BucketInMemory x(has_scale ? scaled(spec) : spec);
    std::fill_n(x.b.outcome, 1, Outcome::kNormal);
    EXPECT_EQ(best().publish(x.b), has_scale);
  }
}

TEST(CpuScale, TheDenseStartIsOfUnscaledGradients) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    if (!shares_estimate(x.b.feedback)) return;
    BucketInMemory y(scaled(x.spec));
    scale_gradient(x, y, kScale);
    for (BucketInMemory* one : {&x, &y}) {
      kernels.remember(one->b);
      ASSERT_TRUE(kernels.adopt(one->b));
    }
    expect_same_state(x, y);
  });
}

// --- reclaim()
// ------------------------------------------------------------------------------------

TEST(CpuReclaim, PutsTheMeanOfTheSentRowsBack) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    if (x.b.feedback != FeedbackKind::kEF14) return;
    const double now[] = {2, .5}, before[] = {4, .25};
    x.b.loss_scale = now;
    x.b.scale_before = before;
    mark_some(x);
    x.pick_at_random();
    const Scalar scalar(x.b);
    const std::vector<Element> old = elements(x);
    kernels.reclaim(x.b);
    const double share = x.b.wire_scale == 1 ? 1 : 1 / x.b.wire_scale / x.b.world_size;
    for (int64_t k = 0; k < x.b.num_segments; ++k) {
      const Segment& s = x.segments[static_cast<size_t>(k)];
      for (int64_t i = 0; i < s.numel; ++i) {
        Element expected = old[static_cast<size_t>(s.offset + i)];
        const int64_t row = i / s.cols;
        if (s.compressed() && x.b.outcome[k] == Outcome::kNormal && is_picked(x, s, row)) {
          const int32_t* picks = x.b.picks + s.pick;
          const auto at =
              std::lower_bound(picks, picks + s.kept, static_cast<int32_t>(row)) - picks;
          const double sent = scalar.w(x.second(s.packed + at * s.cols + i % s.cols));
          expected.a = scalar.s(scalar.w(expected.a + scalar.w(sent * scalar.w(share))));
        }
        expect_state(x, s.offset + i, expected);
      }
    }
    x.b.loss_scale = x.b.scale_before = nullptr;
  });
}

TEST(CpuReclaim, IsForAScaleThatHasFallen) {
  BucketSpec spec;
  spec.tensors = {{40, 20, 1}};
  spec.feedback = FeedbackKind::kEF14;
  for (const auto& [before, now, falls] :
       {std::tuple{4.0, 4.0, false}, {4.0, 8.0, false}, {4.0, 2.0, true}}) {
    BucketInMemory x(spec);
    x.b.loss_scale = &now;
    x.b.scale_before = &before;
    std::fill_n(x.b.outcome, 1, Outcome::kNormal);
    x.pick_at_random();
    const auto old = x.contents();
    best().reclaim(x.b);
    EXPECT_EQ(x.contents() != old, falls);
  }
}

}  // namespace
}  // namespace arc_topk::testing
