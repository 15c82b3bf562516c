// Low rank's CUDA kernels against the CPU's, to the bit: all of them make their sums in the same
// order.
//
// Each test runs the kernels' bodies on the host, and the kernels themselves on a GPU where
// ARC_TOPK_TEST_DEVICE=cuda asks for it (`make gpu-check` does).
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "cuda_on_host.h"
#include "kernels_on.h"
#include "one_rank.h"
#include "state/backend.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::CudaOnHost;
using ::arc_topk::testing::kernels_asked_for;
using ::arc_topk::testing::OneRank;
using ::arc_topk::testing::random_gradient;
using ::arc_topk::testing::same_bits;
using ::arc_topk::testing::Setting;
using ::arc_topk::testing::Sizes;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16, kF16 = DType::kF16,
                kU8 = DType::kU8;

std::vector<std::string> devices() {
  std::vector<std::string> names = {"host"};
  if (kernels_asked_for() != "host") names.push_back("cuda");
  return names;
}

// A bucket of CUDA's kernels beside one of the CPU's.
class CudaLowRank : public ::testing::TestWithParam<std::string> {
 protected:
  bool on_host() const { return GetParam() == "host"; }
  const Kernels& kernels() const {
    static const CudaOnHost bodies;
    if (on_host()) return bodies;
    testing::kernels_on(GetParam());  // throws where there is no GPU
    return *cuda_kernels();
  }

  OneRank on_device(const Setting& setting, bool may_be_unused) const {
    if (!on_host())
      return OneRank(setting, *kernels().low_rank(), may_be_unused, c10::Device(c10::kCUDA, 0));
    set_backend(c10::kCPU, {&kernels(), std::nullopt});
    OneRank its(setting, *kernels().low_rank(), may_be_unused);
    set_backend(c10::kCPU, {});
    return its;
  }
  static OneRank on_cpu(const Setting& setting, bool may_be_unused) {
    return OneRank(setting, *cpu_kernels().low_rank(), may_be_unused);
  }
};
INSTANTIATE_TEST_SUITE_P(, CudaLowRank, ::testing::ValuesIn(devices()),
                         [](const auto& info) { return "on_" + info.param; });

// Which NaN it is does not matter.
at::Tensor comparable(const at::Tensor& x) {
  const at::Tensor there = x.cpu();
  if (!there.is_floating_point()) return there;
  return at::where(there.isnan(), at::full({}, NAN, there.options()), there).contiguous();
}

void expect_same(const at::Tensor& cpu, const at::Tensor& cuda, const std::string& what) {
  const at::Tensor a = comparable(cpu), b = comparable(cuda);
  if (same_bits(a, b)) return;
  const at::Tensor at = (a != b).logical_and((a == a).logical_or(b == b)).nonzero();
  ADD_FAILURE() << what << ": " << at.size(0) << " of " << a.numel() << " differ, the first: "
                << (at.size(0) > 0 ? std::to_string(at[0].item<int64_t>()) : "a zero's sign");
}

// The columns of factors, without what lies between them.
at::Tensor columns_of(const BucketState& state, const at::Tensor& factor) {
  std::vector<at::Tensor> all;
  for (size_t i = 0; i < state.plan.segments.size(); ++i) {
    const Segment& s = state.plan.segments[i];
    const FactorPlace& place = state.plan.factors[i];
    if (s.compressed())
      all.push_back(factor.as_strided({s.kept, s.cols}, {factor_stride(s.cols), 1}, place.right)
                        .reshape({-1}));
  }
  return at::cat(all);
}

void expect_same(const OneRank& cpu, const OneRank& cuda, const std::string& when) {
  const BucketState &a = cpu.state(), &b = cuda.state();
  expect_same(cpu.result(), cuda.result(), when + ", result");
  expect_same(a.left, b.left, when + ", P^");
  expect_same(columns_of(a, a.basis), columns_of(b, b.basis), when + ", W");
  if (!a.second.empty()) expect_same(a.second[0], b.second[0], when + ", second payload");
  expect_same(a.marks, b.marks, when + ", used, bad and outcome");
  if (!a.own_a.defined()) return;
  expect_same(a.own_a, b.own_a, when + ", own state");
  expect_same(columns_of(a, a.right), columns_of(b, b.right), when + ", R_i");
}

// A step of both, and all that is left of it.
void step(OneRank& cpu, OneRank& cuda, const at::Tensor& g, uint64_t number,
          bool used_elsewhere = false) {
  const std::string when = "step " + std::to_string(number);
  for (OneRank* one : {&cpu, &cuda}) one->prepare(g, number);
  const bool directions = cpu.state().plan.types.sends_directions();
  const auto first = [&](const OneRank& one) {
    return (directions ? one.state().narrow : one.state().first)[0];
  };
  expect_same(first(cpu), first(cuda), when + ", first payload");
  for (OneRank* one : {&cpu, &cuda}) {
    for (size_t i = 1; used_elsewhere && i < cpu.state().plan.segments.size(); i += 2)
      one->used_elsewhere(i);
    one->finish();
  }
  expect_same(cpu, cuda, when);
}

// Zero in two tensors, not finite in two others.
at::Tensor spoiled(at::Tensor g, const BucketState& state) {
  const std::vector<Segment>& segments = state.plan.segments;
  const auto part = [&](size_t i) { return g.narrow(0, segments[i].offset, segments[i].numel); };
  for (size_t i : {size_t{0}, size_t{1}}) part(i).zero_();
  const auto set = [&](size_t i, double x) {
    if (segments[i].numel > 0) part(i)[segments[i].numel / 2] = x;
  };
  set(2, std::numeric_limits<double>::quiet_NaN());
  set(3, -std::numeric_limits<double>::infinity());
  return g;
}

// What happens to a bucket in its life, on both.
void live(OneRank cpu, OneRank cuda, bool scaled) {
  const int64_t numel = cpu.result().numel();
  double scale = 64;
  for (uint64_t number = 0; number < 6; ++number) {
    if (scaled) {
      if (number == 3) scale = 32;  // the step before was skipped
      for (OneRank* one : {&cpu, &cuda}) one->take_scale(scale);
      if (number > 0) {
        cpu.reclaim();
        cuda.reclaim();
        expect_same(cpu, cuda, "reclaim before step " + std::to_string(number));
      }
    }
    if (number == 4) {
      cpu.settle();
      cuda.settle();
      expect_same(cpu, cuda, "settle");
    }
    at::Tensor g = random_gradient(numel, number) * (scaled ? scale : 1.0);
    if (number == 1) g = spoiled(g, cpu.state());
    step(cpu, cuda, g, number, number == 1);
    if (::testing::Test::HasFailure()) return;
  }
}

// --- tests ---------------------------------------------------------------------------------------

// Widths around a vector, a chunk of a sum, a window and a strip, in one bucket. The first two are
// zero in one step, of which other ranks have used the second; those behind them not finite.
const Sizes kShapes = {{37, 53}, {31, 40}, {5, 1100}, {1030, 9},   {64, 16}, {7},    {1, 300},
                       {300, 1}, {2, 512}, {0},       {1},         {1, 1},   {9},    {70, 513},
                       {3, 7},   {12},     {600, 24}, {130, 1025}, {8, 8},   {4, 4}, {1, 1}};

// The same with less in them: for all types in turn, of which some take kShapes.
const Sizes kFewElements = {{37, 53}, {31, 40}, {3, 1100}, {1030, 2}, {64, 16}, {7},   {1, 300},
                            {300, 1}, {2, 512}, {0},       {1},       {1, 1},   {9},   {3, 513},
                            {3, 7},   {12},     {520, 3},  {2, 1025}, {8, 8},   {4, 4}};

std::vector<Setting> settings() {
  std::vector<Setting> all;
  const DType narrow[] = {kF32, kBF16, kF16};
  int64_t ranks[] = {1, 3, 8, 17};
  size_t i = 0;
  for (const FeedbackKind feedback : {FeedbackKind::kEF14, FeedbackKind::kNone}) {
    for (const at::ScalarType gradient : {at::kFloat, at::kBFloat16, at::kHalf}) {
      for (const DType state : narrow) {
        if (feedback == FeedbackKind::kNone && state != kF32) continue;
        for (const DType wire : {kF32, kBF16, kF16, kU8}) {
          const std::optional<int64_t> width =
              i % 3 == 2 ? std::optional<int64_t>(i % 2 == 0 ? 150 : 150 + 1) : std::nullopt;
          const Sizes& shapes = i % 9 == 0 ? kShapes : kFewElements;
          all.push_back(
              {gradient, wire, state, feedback, width, ranks[i++ % 4], shapes, i % 2 == 0 ? 1 : 3});
        }
      }
    }
    for (const DType wire : {kF64, kF32, kBF16, kF16, kU8})
      all.push_back({at::kDouble, wire, kF64, feedback, {}, ranks[i++ % 4], kFewElements, 2});
  }
  return all;
}

std::string describe(const Setting& s) {
  return std::string(c10::toString(s.gradient)) + ", state " +
         std::to_string(static_cast<int>(s.state)) + ", wire " +
         std::to_string(static_cast<int>(s.wire)) + ", feedback " +
         std::to_string(static_cast<int>(s.feedback)) + ", row width " +
         std::to_string(s.row_width.value_or(0)) + ", k " + std::to_string(s.rank);
}

TEST_P(CudaLowRank, StepsAreTheCpus) {
  size_t i = 0;
  for (const Setting& setting : settings()) {
    SCOPED_TRACE(describe(setting));
    const bool may_be_unused = i % 3 != 0, scaled = i % 2 == 0;
    ++i;
    live(on_cpu(setting, may_be_unused), on_device(setting, may_be_unused), scaled);
    if (HasFailure()) return;
  }
}

TEST_P(CudaLowRank, AnyNumberOfColumnsIsTheCpus) {
  const Sizes shapes = {{100, 90}, {70, 600}, {16, 16}, {9, 80}};
  for (const int64_t rank : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 100}) {
    for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
      const DType own = type == at::kFloat ? kF32 : kF64;
      const Setting setting{type, own, own, FeedbackKind::kEF14, {}, rank, shapes};
      SCOPED_TRACE(describe(setting));
      OneRank cpu = on_cpu(setting, false), cuda = on_device(setting, false);
      for (uint64_t number = 0; number < 2; ++number)
        step(cpu, cuda, random_gradient(cpu.result().numel(), number), number);
      if (HasFailure()) return;
    }
  }
}

// A bucket of one matrix, whose columns are what becomes of these.
TEST_P(CudaLowRank, MatricesWithoutFullRankAreTheCpus) {
  constexpr int64_t kRows = 40, kCols = 30;
  const at::Tensor noise = random_gradient(kRows * kCols, 3).view({kRows, kCols});
  const at::Tensor one = noise.narrow(1, 0, 1), two = noise.narrow(1, 1, 1);
  at::Tensor some_zero = noise.clone();
  some_zero.narrow(1, 4, 20).zero_();
  const std::vector<std::pair<const char*, at::Tensor>> contents = {
      {"zeros", at::zeros({kRows, kCols}, at::kDouble)},
      {"ones", at::ones({kRows, kCols}, at::kDouble)},
      {"one column, again and again", one.expand({kRows, kCols}).contiguous()},
      {"two columns", at::cat({one, two}, 1).repeat({1, kCols / 2})},
      {"zero columns", some_zero},
      {"huge", noise * 1e37},
      {"tiny", noise * 1e-37},
      {"the largest", noise.sign() * std::numeric_limits<float>::max()},
      {"huge and tiny", noise * at::logspace(-40, 37, kRows, 10, at::kDouble).view({-1, 1})},
  };
  for (const auto& [name, g] : contents) {
    for (const DType wire : {kF32, kF16, kU8}) {
      for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
        const DType own = type == at::kFloat ? kF32 : kF64;
        const Setting setting{type, wire, own, FeedbackKind::kEF14, {}, 6, {{kRows, kCols}}};
        SCOPED_TRACE(std::string(name) + ", " + describe(setting));
        OneRank cpu = on_cpu(setting, false), cuda = on_device(setting, false);
        for (uint64_t number = 0; number < 3; ++number) {
          step(cpu, cuda, g.reshape({-1}), number);
          EXPECT_TRUE(cuda.state().left.isfinite().all().item<bool>());
          EXPECT_TRUE(cuda.state().basis.isfinite().all().item<bool>());
        }
        EXPECT_TRUE(cuda.residual().isfinite().all().item<bool>());
        if (HasFailure()) return;
      }
    }
  }
}

// More rows than one pass of a block's warps has chunks for, and columns.
TEST_P(CudaLowRank, LongColumnsAreTheCpus) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    const DType own = type == at::kFloat ? kF32 : kF64;
    const Setting setting{type, own, own, FeedbackKind::kEF14, {}, 3, {{9001, 8}, {8, 9001}}};
    OneRank cpu = on_cpu(setting, false), cuda = on_device(setting, false);
    for (uint64_t number = 0; number < 2; ++number)
      step(cpu, cuda, random_gradient(cpu.result().numel(), number), number);
  }
}

TEST(CudaLowRankOnHost, LaunchesDoNotGrowWithTheNumberOfTensors) {
  for (const bool dense : {false, true}) {
    std::vector<size_t> launches;
    for (const size_t count : {1, 30, 300}) {
      Setting setting{at::kFloat, kF32};
      setting.rank = 2;
      setting.shapes = Sizes(count, {16, 16});
      if (dense) setting.shapes.push_back({16});
      CudaOnHost kernels;
      set_backend(c10::kCPU, {&kernels, std::nullopt});
      OneRank one(setting, *kernels.low_rank());
      set_backend(c10::kCPU, {});
      one.step(random_gradient(one.result().numel(), 0), 0);
      launches.push_back(kernels.launcher().launched.size());
    }
    EXPECT_EQ(launches, std::vector<size_t>(3, dense ? 12 : 11));
  }
}

// Blocks in any order (on the host another one with every launch), on the same memory: the same
// bits.
TEST_P(CudaLowRank, TheOrderOfBlocksDoesNotMatter) {
  for (const Setting& setting : testing::kSettings) {
    OneRank first = on_device(setting, true), second = on_device(setting, true);
    for (uint64_t number = 0; number < 2; ++number) {
      const at::Tensor g = random_gradient(first.result().numel(), number);
      first.step(g, number);
      second.step(g, number);
      expect_same(first, second, "step " + std::to_string(number));
    }
  }
}

}  // namespace
}  // namespace arc_topk
