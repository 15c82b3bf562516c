// Low rank's kernels: the same bits from every instruction set and number of threads, and what must
// hold whatever the numbers are. The equations themselves: tests/python/test_low_rank.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "cpu_against_loops.h"
#include "one_rank.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::all_tables;
using ::arc_topk::testing::kSettings;
using ::arc_topk::testing::OneRank;
using ::arc_topk::testing::random_gradient;
using ::arc_topk::testing::same_bits;
using ::arc_topk::testing::Setting;
using ::arc_topk::testing::Sizes;

void expect_same(const OneRank& a, const OneRank& b, const std::string& where) {
  const auto x = a.everything(), y = b.everything();
  ASSERT_EQ(x.size(), y.size());
  for (size_t i = 0; i < x.size(); ++i)
    EXPECT_TRUE(same_bits(x[i], y[i])) << where << ", array " << i;
}

const LowRankKernels& best() { return *cpu_kernels().low_rank(); }

TEST(LowRank, EveryInstructionSetGivesTheSameBits) {
  for (const Setting& setting : kSettings) {
    OneRank expected(setting, best());
    std::vector<std::unique_ptr<OneRank>> others;
    for (const cpu::Rows* table : all_tables())
      others.push_back(std::make_unique<OneRank>(setting, *cpu::kernels_with(*table).low_rank()));
    for (uint64_t number = 0; number < 3; ++number) {
      const at::Tensor g = random_gradient(expected.result().numel(), number);
      expected.step(g, number);
      ASSERT_TRUE(expected.result().isfinite().all().item<bool>());
      for (size_t i = 0; i < others.size(); ++i) {
        others[i]->step(g, number);
        expect_same(*others[i], expected, all_tables()[i]->isa);
      }
    }
  }
}

TEST(LowRank, TheNumberOfThreadsChangesNoBit) {
  const int before = at::get_num_threads();
  for (const Setting& setting : kSettings) {
    OneRank one(setting, best()), three(setting, best());
    for (uint64_t number = 0; number < 3; ++number) {
      const at::Tensor g = random_gradient(one.result().numel(), number);
      at::set_num_threads(1);
      one.step(g, number);
      at::set_num_threads(3);
      three.step(g, number);
    }
    at::set_num_threads(before);
    expect_same(one, three, "threads");
  }
}

TEST(LowRank, AGradientWrittenPastTheCachesIsTheSame) {
  const Sizes whole_registers = {{10, 64}, {7, 512}, {6, 1040}};
  for (Setting setting : kSettings) {
    for (const Sizes& shapes : {::arc_topk::testing::kShapes, whole_registers}) {
      setting.shapes = shapes;
      for (const cpu::Rows* table : all_tables()) {
        const LowRankKernels& kernels = *cpu::kernels_with(*table).low_rank();
        OneRank small(setting, kernels), large(setting, kernels);
        large.claim_to_be_large();
        for (uint64_t number = 0; number < 2; ++number) {
          const at::Tensor g = random_gradient(small.result().numel(), number);
          small.step(g, number);
          large.step(g, number);
          expect_same(large, small, table->isa);
        }
      }
    }
  }
}

TEST(LowRank, AResidualThatIsWrittenDownBetweenStepsChangesNoLaterBit) {
  for (const Setting& setting : kSettings) {
    OneRank straight(setting, best()), settled(setting, best());
    for (uint64_t number = 0; number < 4; ++number) {
      const at::Tensor g = random_gradient(straight.result().numel(), number);
      straight.step(g, number);
      settled.step(g, number, /*settles=*/true);
      expect_same(straight, settled, "step " + std::to_string(number));
    }
  }
}

// Columns of unit norm, orthogonal to each other; others zero.
void expect_orthonormal(const BucketState& state) {
  for (size_t i = 0; i < state.plan.segments.size(); ++i) {
    const Segment& s = state.plan.segments[i];
    const FactorPlace& place = state.plan.factors[i];
    if (!s.compressed()) continue;
    const at::Tensor left =
        state.left.narrow(0, place.left, s.rows * s.kept).view({s.rows, s.kept}).to(at::kDouble);
    const at::Tensor gram = left.t().matmul(left);
    const at::Tensor wanted = at::diag((gram.diagonal() > 0.5).to(at::kDouble));
    EXPECT_LT((gram - wanted).abs().max().item<double>(), 1e-6) << s.rows << " x " << s.cols;
    const at::Tensor w =
        state.basis.as_strided({s.kept, s.cols}, {factor_stride(s.cols), 1}, place.right);
    const at::Tensor norms = w.to(at::kDouble).norm(2, 1);
    EXPECT_TRUE(((norms - 1).abs().lt(1e-6) | norms.eq(0)).all().item<bool>());
  }
}

TEST(LowRank, MessagesOfAnySizeAndRankLoseNothing) {
  constexpr double kHuge = 1e30, kTiny = 1e-30;
  for (const double scale : {1.0, kHuge, kTiny, 0.0}) {
    for (const bool of_rank_one : {false, true}) {
      OneRank rank({at::kFloat, DType::kF32}, best());
      at::Tensor owed = at::zeros({rank.result().numel()}, at::kDouble);
      for (uint64_t number = 0; number < 4; ++number) {
        at::Tensor g = random_gradient(owed.numel(), number);
        if (of_rank_one) g.fill_(1);
        g = (g * scale).to(at::kFloat).to(at::kDouble);
        rank.step(g, number);
        expect_orthonormal(rank.state());
        const at::Tensor result = rank.result().to(at::kDouble);
        ASSERT_TRUE(result.isfinite().all().item<bool>());
        owed += g - result;
        // One rank: C_i = C. The vector stays dense and owes nothing.
        const at::Tensor left = rank.residual().to(at::kDouble);
        EXPECT_LE((left - owed).abs().max().item<double>(), 2e-5 * scale);
        if (of_rank_one) {
          EXPECT_LE(left.abs().max().item<double>(), 1e-5 * scale);
        }
      }
    }
  }
}

TEST(LowRank, TheLargestNumbersLeaveAFiniteState) {
  const float largest = std::numeric_limits<float>::max();
  for (const DType wire : {DType::kF32, DType::kF16}) {
    OneRank rank({at::kFloat, wire}, best());
    for (uint64_t number = 0; number < 4; ++number) {
      const at::Tensor g = random_gradient(rank.result().numel(), number);
      rank.step(g.sign() * static_cast<double>(largest), number);
      EXPECT_TRUE(rank.residual().isfinite().all().item<bool>());
      EXPECT_TRUE(rank.state().basis.isfinite().all().item<bool>());
      EXPECT_TRUE(rank.state().left.isfinite().all().item<bool>());
    }
  }
}

TEST(LowRank, AStepThatDoesNotCountLeavesStateAndBasis) {
  for (const Setting& setting : kSettings) {
    if (setting.feedback == FeedbackKind::kNone) continue;
    OneRank rank(setting, best(), /*may_be_unused=*/true);
    for (uint64_t number = 0; number < 2; ++number)
      rank.step(random_gradient(rank.result().numel(), number), number);
    const at::Tensor basis = rank.state().basis.clone();
    const at::Tensor left = rank.state().left.clone();
    const at::Tensor right = rank.state().right.clone();

    rank.step(at::zeros({rank.result().numel()}), 2);
    EXPECT_FALSE(rank.result().any().item<bool>());
    EXPECT_TRUE(same_bits(rank.state().right, right)) << "what was sent before is still pending";
    const at::Tensor owed = rank.residual();

    at::Tensor bad = random_gradient(rank.result().numel(), 3);
    for (const Segment& s : rank.state().plan.segments)
      bad[s.offset + s.numel / 2] = std::numeric_limits<double>::quiet_NaN();
    rank.step(bad, 3);
    EXPECT_TRUE(same_bits(rank.state().basis, basis));
    EXPECT_TRUE(same_bits(rank.state().left, left));
    for (const Segment& s : rank.state().plan.segments) {
      if (!s.compressed()) continue;
      EXPECT_TRUE(rank.result().narrow(0, s.offset, s.numel).isnan().all().item<bool>());
    }
    const at::Tensor after = rank.residual();
    const double unit = setting.state == DType::kBF16 ? 0.1 : 1e-5;
    EXPECT_LT((after - owed).abs().max().item<double>(), unit);
  }
}

TEST(LowRank, AStepThatFailsBehindPrepareOwesAllOfIt) {
  OneRank rank({at::kFloat, DType::kF32}, best());
  const at::Tensor g = random_gradient(rank.result().numel(), 0);
  rank.step(g, 0);
  const at::Tensor before = rank.residual();
  OneRank failed({at::kFloat, DType::kF32}, best());
  failed.step(g, 0);
  at::Tensor buffer = failed.result();
  buffer.copy_(g);
  best().prepare(failed.state().bucket, 11, 1);
  const at::Tensor after = failed.residual();
  for (const Segment& s : failed.state().plan.segments) {
    if (!s.compressed()) continue;
    const auto part = [&](const at::Tensor& x) { return x.narrow(0, s.offset, s.numel); };
    EXPECT_LT((part(after) - part(before) - part(g)).abs().max().item<double>(), 1e-5);
  }
}

TEST(LowRank, KIsWhatTheRatioPaysForOrWhatIsAskedFor) {
  Config config;
  config.compressor = "low_rank";
  const auto columns = [&](int64_t rows, int64_t cols, DType type = DType::kF32) {
    return make_plan(config, low_rank(), type, {{rows * cols, 2, rows, 0}}, 2).segments[0].kept;
  };
  config.ratio = 0.1;
  EXPECT_EQ(columns(100, 50), 3);
  EXPECT_EQ(columns(1000, 1000), 50);
  config.ratio = 1e-6;
  EXPECT_EQ(columns(100, 50), 1);
  EXPECT_EQ(columns(3, 1), 0) << "as many bytes as dense";
  config.rank = 7;
  EXPECT_EQ(columns(100, 50), 7);
  EXPECT_EQ(columns(1000, 9), 7);
  config.compress_without_gain = true;
  EXPECT_EQ(columns(100, 4), 4);
}

}  // namespace
}  // namespace arc_topk
