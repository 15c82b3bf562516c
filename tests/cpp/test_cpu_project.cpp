// V is the generator's numbers, whatever stretch of it is asked for.
#include <gtest/gtest.h>

#include <vector>

#include "base/random.h"
#include "cpu_against_loops.h"

namespace arc_topk::testing {
namespace {

TEST(CpuProject, IsTheGeneratorsNumbers) {
  for (const cpu::Rows* table : all_tables()) {
    for (int64_t dim : {1, 4, 6}) {
      constexpr int64_t kStride = 10000;
      std::vector<float> v(dim * kStride, -1.0f);
      Bucket b{};
      b.sketch_dim = dim;
      cpu::kernels_with(*table).project(b, v.data(), kStride, 3, 9001, 0x123456789abcull,
                                        1ull << 33 | 5);
      for (int64_t k = 0; k < dim; ++k) {
        for (int64_t row : {3, 4, 511, 515, 4099, 9000}) {
          const Normals four = projection_normals(row, k / 4, 0x123456789abcull, 1ull << 33 | 5);
          ASSERT_EQ(v[k * kStride + row], four.z[k % 4]) << table->isa << ", row " << row;
        }
        EXPECT_EQ(v[k * kStride + 2], -1.0f);
        EXPECT_EQ(v[k * kStride + 9001], -1.0f);
      }
    }
  }
}

}  // namespace
}  // namespace arc_topk::testing
