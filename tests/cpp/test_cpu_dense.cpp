// Steps that send whole gradients: what they leave in the estimates.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "cpu_against_loops.h"

namespace arc_topk::testing {
namespace {

TEST(CpuDenseSteps, RememberAndAdoptStartTheEstimates) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    if (!shares_estimate(x.b.feedback)) return;
    const auto expect_all = [&](const std::function<void(int64_t, double)>& check) {
      for (int64_t i = 0; i < x.b.numel; ++i) check(i, rounded(x.b.state_type, x.gradient(i)));
    };
    kernels.remember(x.b);
    expect_all([&](int64_t i, double g) {
      const bool momentum = x.b.feedback == FeedbackKind::kEF21M;
      ASSERT_EQ(x.own_a(i), momentum ? 0 : g);
      if (momentum) {
        ASSERT_EQ(x.own_b(i), g);
      }
    });
    EXPECT_TRUE(kernels.adopt(x.b));
    expect_all([&](int64_t i, double g) { ASSERT_EQ(x.shared(i), g); });

    const double h = x.shared(0);
    x.set_gradient(0, 12);
    x.set_gradient(x.b.numel - 1, kInf);
    EXPECT_FALSE(kernels.adopt(x.b));
    EXPECT_EQ(x.shared(0), h) << "h is left alone";
  });
}

TEST(CpuDenseSteps, BlendIsMomentumOfTheMean) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    if (x.b.feedback != FeedbackKind::kEF21M) return;
    BucketSpec spec = x.spec;
    for (Tensor& tensor : spec.tensors) tensor = {tensor.numel};
    BucketInMemory y(spec);
    for (int64_t i = 0; i < 7; ++i) y.set_gradient(y.segments[5].offset + i, 0);
    y.set_gradient(y.segments[14].offset + 3, NAN);
    const std::vector<double> h = shared_values(y);
    const Scalar scalar(y.b);
    kernels.blend(y.b);
    for (int64_t index = 0; index < y.b.num_segments; ++index) {
      const Segment& s = y.segments[index];
      if (s.numel > 0) {
        EXPECT_EQ(y.b.outcome[index], dense_outcome(y.b, index));
      }
      for (int64_t i = s.offset; i < s.offset + s.numel; ++i) {
        const double keep = scalar.w(1 - y.b.eta), eta = scalar.w(y.b.eta);
        const double blended =
            scalar.s(scalar.w(scalar.w(keep * h[i]) + scalar.w(eta * y.gradient(i))));
        ASSERT_EQ(y.shared(i), dense_outcome(y.b, index) == Outcome::kNormal ? blended : h[i]);
      }
    }
    check_published(kernels, y);
  });
}

}  // namespace
}  // namespace arc_topk::testing
