// What the machine decides: threads, which change nothing, and the instruction set.
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <vector>

#include "cpu_against_loops.h"

namespace arc_topk::testing {
namespace {

TEST(CpuThreads, ChangeNoBit) {
  BucketSpec spec;
  spec.tensors = odd_tensors();
  spec.tensors.push_back({200 * 300, 300, 40});
  spec.feedback = FeedbackKind::kEF21M;
  const int before = at::get_num_threads();
  std::vector<std::vector<unsigned char>> contents[2];
  double totals[2], captured[2];
  for (int i = 0; i < 2; ++i) {
    at::set_num_threads(i + 1);
    BucketInMemory x(spec);
    const Projection v = x.projection();
    const cpu::CpuKernels& kernels = best();
    kernels.scan(x.b);
    kernels.update(x.b, &v);
    kernels.settle(x.b);
    totals[i] = kernels.score(x.b);
    kernels.pick(x.b);
    kernels.pack(x.b, cpu::PackMode::kBoth);
    captured[i] = kernels.apply_reduced(x.b);
    contents[i] = x.contents();
  }
  at::set_num_threads(before);
  EXPECT_EQ(totals[0], totals[1]);
  EXPECT_EQ(captured[0], captured[1]);
  EXPECT_EQ(contents[0], contents[1]);
}

TEST(CpuIsa, NamesTheBestTable) { EXPECT_STREQ(cpu_isa(), all_tables().back()->isa); }

}  // namespace
}  // namespace arc_topk::testing
