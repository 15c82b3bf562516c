// The adapter that takes buckets to a device: what it must carry, keep and find out.
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <functional>

#include "bucket_in_memory.h"
#include "cuda_against_cpu.h"
#include "cuda_on_host.h"
#include "on_device.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::BucketSpec;
using ::arc_topk::testing::CudaBucket;
using ::arc_topk::testing::OnDevice;

// Looks at the bucket that it is given.
class Probe final : public testing::CudaOnHost {
 public:
  explicit Probe(std::function<void(const Bucket&)> look) : look_(std::move(look)) {}
  void divide(const Bucket& b) const override { look_(b); }
  void apply(const Bucket& b, const Gathered* messages) const override {
    look_(b);
    gathered = *messages;
  }
  mutable Gathered gathered{};

 private:
  const std::function<void(const Bucket&)> look_;
};

BucketSpec small() {
  BucketSpec spec;
  spec.tensors = {{5 * 7, 7, 2}, {9}};
  spec.feedback = FeedbackKind::kEF21M;
  return spec;
}

TEST(OnDevice, CarriesAllThere) {
  CudaBucket x(small());
  const std::vector<double> before = {x.gradient(3), x.own_a(43), x.shared(0), x.first(28),
                                      x.second(13)};
  const Probe probe([&](const Bucket& b) {
    EXPECT_EQ(testing::get(b.gradient_type, b.gradient, 3), before[0]);
    EXPECT_EQ(testing::get(b.state_type, b.own_a, 43), before[1]);
    EXPECT_EQ(testing::get(b.state_type, b.shared, 0), before[2]);
    EXPECT_EQ(testing::get(DType::kF32, b.first, 28), before[3]);
    EXPECT_EQ(testing::get(b.wire_type, b.second, 13), before[4]);
    EXPECT_EQ(b.segments[1].numel, 9);
    EXPECT_EQ(b.pieces[1].segment, 1);
  });
  OnDevice(probe, c10::kCPU).divide(x.b);
}

// Nor does it leave out a pointer: whatever looks like an address in the bucket is another there.
TEST(OnDevice, LeavesNoPointerAsItWas) {
  using Words = std::array<uint64_t, sizeof(Bucket) / 8>;
  CudaBucket x(small());
  const auto here = std::bit_cast<Words>(x.b);
  size_t addresses = 0;
  const Probe probe([&](const Bucket& b) {
    const auto there = std::bit_cast<Words>(b);
    for (size_t i = 0; i < here.size(); ++i) {
      // A small number or two, or a double.
      if (here[i] >> 40 == 0 || here[i] >> 48 != 0) continue;
      EXPECT_NE(here[i], there[i]) << "at byte " << 8 * i << " of the bucket";
      ++addresses;
    }
  });
  OnDevice(probe, c10::kCPU).divide(x.b);
  EXPECT_EQ(addresses, 17u);
}

TEST(OnDevice, BringsBackWhatWasWrittenThere) {
  CudaBucket x(small());
  auto expected = x.contents();
  const Probe probe([](const Bucket& b) {
    testing::set(b.gradient_type, b.gradient, 3, 42);
    b.energy->captured = 17;
  });
  OnDevice(probe, c10::kCPU).divide(x.b);
  EXPECT_EQ(x.gradient(3), 42);
  EXPECT_EQ(x.energy.captured, 17);
  x.set_gradient(3, CudaBucket(small()).gradient(3));
  EXPECT_EQ(x.contents(), expected);
}

TEST(OnDevice, LeavesNothingOfUseOnTheHost) {
  CudaBucket x(small());
  const Bucket& here = x.b;
  const Probe probe([&](const Bucket& b) {
    EXPECT_TRUE(std::isnan(testing::get(here.gradient_type, here.gradient, 0)));
    EXPECT_EQ(here.segments[0].numel, -1);
    testing::set(here.gradient_type, here.gradient, 1, 5);  // is lost
    EXPECT_NE(b.gradient, here.gradient);
  });
  const double before = x.gradient(1);
  OnDevice(probe, c10::kCPU).divide(x.b);
  EXPECT_EQ(x.gradient(1), before);
}

TEST(OnDevice, FindsWhatIsWrittenBesideAnArray) {
  CudaBucket x(small());
  for (const int64_t place : {int64_t{-1}, x.b.numel}) {
    const Probe probe(
        [&](const Bucket& b) { testing::set(b.gradient_type, b.gradient, place, 0); });
    EXPECT_THROW(OnDevice(probe, c10::kCPU).divide(x.b), std::logic_error);
  }
}

// A payload within a message, which begins anywhere.
TEST(OnDevice, KeepsWhatLiesInOneMessageThere) {
  CudaBucket x(small());
  alignas(256) char messages[1024] = {};
  x.b.second = messages + 6;
  x.b.picks = reinterpret_cast<int32_t*>(messages + 100);
  Bucket there{};
  const Probe probe([&](const Bucket& b) { there = b; });
  const Gathered message{messages, messages + 300, 200};
  OnDevice(probe, c10::kCPU).apply(x.b, &message);
  const auto* own = static_cast<const char*>(probe.gathered.own);
  EXPECT_EQ(static_cast<const char*>(there.second) - own, 6);
  EXPECT_EQ(reinterpret_cast<const char*>(there.picks) - own, 100);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(there.second) % 256, 6u);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(probe.gathered.data) % 256, 300u % 256);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(there.gradient) % 256,
            reinterpret_cast<uintptr_t>(x.b.gradient) % 256);
}

TEST(OnDevice, KeepsNullNull) {
  BucketSpec spec = small();
  spec.feedback = FeedbackKind::kNone;
  CudaBucket x(spec);
  const Probe probe([](const Bucket& b) {
    EXPECT_EQ(b.own_a, nullptr);
    EXPECT_EQ(b.shared, nullptr);
    EXPECT_EQ(b.stream, nullptr);
  });
  OnDevice(probe, c10::kCPU).divide(x.b);
}

}  // namespace
}  // namespace arc_topk
