// Which tensors are used, and what the flags of all ranks make of that.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_against_loops.h"

namespace arc_topk::testing {
namespace {

TEST(CpuScan, FindsTheOneNonZeroElement) {
  for (DType type : {kF32, kF64, kBF16, kF16}) {
    for (const cpu::Rows* table : all_tables()) {
      BucketSpec spec;
      spec.tensors = {{1000, 10, 5}, {1000, 10, 5}, {700, 1, 0}, {1000, 10, 5}};
      spec.gradient = type;
      BucketInMemory x(spec);
      for (int64_t i = 0; i < x.b.numel; ++i) x.set_gradient(i, i % 2 ? -0.0 : 0.0);
      x.set_gradient(1777, 6e-8);
      x.set_gradient(3699, NAN);
      cpu::kernels_with(*table).scan(x.b);
      EXPECT_EQ(x.b.used[0], 0) << table->isa;
      EXPECT_EQ(x.b.used[1], 1) << table->isa;
      EXPECT_EQ(x.b.used[3], 1) << table->isa << ": NaN is not zero";
    }
  }
}

TEST(CpuFlags, TellWhatBecameOfEachTensor) {
  for (DType type : {kF32, kF64, kBF16, kF16}) {
    BucketSpec spec;
    spec.tensors = {{10, 5, 1}, {10, 5, 1}, {3, 1, 0}, {10, 5, 1}};
    spec.wire = type;
    BucketInMemory ranks[3] = {BucketInMemory(spec), BucketInMemory(spec), BucketInMemory(spec)};
    // Flags of all ranks, at odd addresses as in a gathered message.
    const int64_t stride = 3 * size_of(type) + 1;
    std::vector<char> gathered(3 * stride + 1);
    for (int rank = 0; rank < 3; ++rank) {
      const Bucket& b = ranks[rank].b;
      std::fill_n(b.bad, 4, uint8_t{0});
      b.used[0] = 0;
      b.used[1] = rank == 1;
      b.used[3] = 1;
      b.bad[3] = rank == 2;
      best().write_flags(b);
      for (int64_t i = 0; i < 3; ++i) {
        const double expected = i == 2 && rank == 2 ? kInf : i == 2 || (i == 1 && rank == 1);
        EXPECT_EQ(get(type, b.flags, i), expected);
      }
      std::memcpy(gathered.data() + 1 + rank * stride, b.flags, 3 * size_of(type));
    }
    const Bucket& b = ranks[0].b;
    const auto expect_outcomes = [&] {
      EXPECT_EQ(b.outcome[0], Outcome::kUnused);
      EXPECT_EQ(b.outcome[1], Outcome::kNormal);
      EXPECT_EQ(b.outcome[3], Outcome::kNonFinite);
    };
    best().read_flags(b, gathered.data() + 1, 3, stride);
    expect_outcomes();
    for (double bad : {kInf, std::nan("")}) {  // and as an all-reduce sums them
      set(type, b.flags, 0, 0);
      set(type, b.flags, 1, 2);
      set(type, b.flags, 2, bad);
      best().read_flags(b, b.flags, 1, 0);
      expect_outcomes();
    }
  }
}

}  // namespace
}  // namespace arc_topk::testing
