// Number types: what is widened, and what is rounded to 16 bits.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cpu_against_loops.h"

namespace arc_topk::testing {
namespace {

// Every 16-bit number through a dense copy, which only converts.
TEST(CpuConversion, WidensEveryNumber) {
  for (DType type : {kBF16, kF16}) {
    for (const cpu::Rows* table : all_tables()) {
      BucketSpec spec;
      spec.tensors = {{1 << 16, 1, 0, true}};
      spec.gradient = type;
      BucketInMemory x(spec);
      for (int i = 0; i < 1 << 16; ++i)
        static_cast<uint16_t*>(x.b.gradient)[i] = static_cast<uint16_t>(i);
      cpu::kernels_with(*table).prepare(x.b, nullptr);
      for (int i = 0; i < 1 << 16; ++i) {
        const double expected = decode_16_bits(type, static_cast<uint16_t>(i));
        if (std::isnan(expected)) {
          ASSERT_TRUE(std::isnan(x.first(i))) << table->isa << ' ' << i;
        } else {
          ASSERT_EQ(x.first(i), expected) << table->isa << ' ' << i;
          ASSERT_EQ(std::signbit(x.first(i)), std::signbit(expected)) << table->isa << ' ' << i;
        }
      }
    }
  }
}

// Floats close to every number of the type, half way between two, and the special ones.
TEST(CpuConversion, NarrowsToTheNearestEven) {
  std::vector<double> floats = {0.0,   -0.0,  kInf,  -kInf,  65519.99,
                                65520, 65536, 1e-45, 3.4e38, 1e38};
  for (DType type : {kBF16, kF16}) {
    for (int bits = 0; bits < 0x7F80; bits += 7) {
      const double low = decode_16_bits(type, static_cast<uint16_t>(bits));
      const double high = decode_16_bits(type, static_cast<uint16_t>(bits + 1));
      if (!std::isfinite(low) || !std::isfinite(high)) break;
      const auto half = static_cast<float>((low + high) / 2);
      for (float f : {static_cast<float>(low), half, std::nextafter(half, 0.0f),
                      std::nextafter(half, INFINITY)}) {
        floats.push_back(f);
        floats.push_back(-f);
      }
    }
  }
  for (DType type : {kBF16, kF16}) {
    for (const cpu::Rows* table : all_tables()) {
      BucketSpec spec;
      spec.tensors = {{static_cast<int64_t>(floats.size()) + 1, 1, 0, false}};
      spec.wire = type;
      BucketInMemory x(spec);
      for (size_t i = 0; i < floats.size(); ++i) x.set_gradient(static_cast<int64_t>(i), floats[i]);
      x.set_gradient(static_cast<int64_t>(floats.size()), NAN);
      cpu::kernels_with(*table).prepare(x.b, nullptr);
      for (size_t i = 0; i < floats.size(); ++i) {
        ASSERT_EQ(x.second(static_cast<int64_t>(i)), rounded(type, static_cast<float>(floats[i])))
            << table->isa << ' ' << floats[i];
      }
      EXPECT_TRUE(std::isnan(x.second(static_cast<int64_t>(floats.size())))) << table->isa;
    }
  }
}

}  // namespace
}  // namespace arc_topk::testing
