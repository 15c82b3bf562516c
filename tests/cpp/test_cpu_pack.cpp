// pack(): the payload, and what the state is left with.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "cpu_against_loops.h"

namespace arc_topk::testing {
namespace {

// Payload and state after packing, from the elements as they were before.
void check_packed(const BucketInMemory& x, const std::vector<Element>& before, bool payload,
                  bool state) {
  const Scalar scalar(x.b);
  for (int64_t index = 0; index < x.b.num_segments; ++index) {
    const Segment& s = x.segments[index];
    if (!s.compressed()) continue;
    const bool sends = !x.b.bad[index] && x.b.outcome[index] == Outcome::kNormal;
    for (int64_t k = 0; k < s.kept; ++k) {
      for (int64_t c = 0; c < s.cols; ++c) {
        const int64_t i = x.b.picks[s.pick + k] * s.cols + c;
        double wire = 0;
        if (i < s.numel && sends) {
          Element e = before[s.offset + i];
          wire = scalar.wire(scalar.message(e));
          if (state) scalar.sent(wire / x.b.wire_scale, e);
          expect_state(x, s.offset + i, e);
        }
        if (payload) {
          ASSERT_EQ(x.second(s.packed + k * s.cols + c), wire) << "segment " << index;
        }
      }
    }
    for (int64_t i = 0; i < s.numel; ++i) {
      const bool untouched = !sends || !is_picked(x, s, i / s.cols);
      if (untouched) expect_state(x, s.offset + i, before[s.offset + i]);
    }
  }
}

TEST(CpuPack, FillsThePayloadAndAccountsForIt) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    mark_some(x);
    x.pick_at_random();
    const std::vector<Element> before = elements(x);
    kernels.pack(x.b, cpu::PackMode::kBoth);
    check_packed(x, before, true, true);
  });
}

TEST(CpuPack, PayloadFirstAndStateLater) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    std::fill_n(x.b.bad, x.b.num_segments, uint8_t{0});
    x.b.bad[8] = 1;
    x.pick_at_random();
    const std::vector<Element> before = elements(x);
    std::fill_n(x.b.outcome, x.b.num_segments, Outcome::kNormal);
    x.b.outcome[2] = Outcome::kUnused;  // of an earlier step: kPayload must not look at it
    kernels.pack(x.b, cpu::PackMode::kPayload);
    x.b.outcome[2] = Outcome::kNormal;
    check_packed(x, before, true, false);

    for (int64_t i = 0; i < x.second_numel; ++i) set(x.b.wire_type, x.b.second, i, 5);  // reduced
    mark_some(x);
    kernels.pack(x.b, cpu::PackMode::kCommit);
    check_packed(x, before, false, true);
    for (int64_t i = 0; i < x.second_numel; ++i) ASSERT_EQ(x.second(i), 5);
  });
}

// Unused here but perhaps not elsewhere: what is sent is what settle() would make of the state, and
// committing after settle() accounts for just that.
TEST(CpuPack, SendsWhatPrepareHeldBack) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    std::fill_n(x.b.used, x.b.num_segments, uint8_t{0});
    for (int64_t i = 0; i < x.b.numel; ++i) x.set_gradient(i, 0);
    x.pick_at_random();
    std::vector<Element> expected = elements(x);
    for (Element& e : expected) Scalar(x.b).prepare(e);
    kernels.update(x.b, nullptr);
    kernels.pack(x.b, cpu::PackMode::kPayload);
    std::fill_n(x.b.outcome, x.b.num_segments, Outcome::kNormal);
    kernels.settle(x.b);
    check_packed(x, expected, true, false);
    kernels.pack(x.b, cpu::PackMode::kCommit);
    check_packed(x, expected, true, true);
  });
}

// What fp16 cannot hold is cut off, and stays in the residual. Cut off before it is scaled, so that
// the sum of all ranks fits as well.
TEST(CpuPack, ClampsToTheWiresRange) {
  for (const cpu::Rows* table : all_tables()) {
    BucketSpec spec;
    spec.tensors = {{40, 20, 2}};
    spec.feedback = FeedbackKind::kEF14;
    spec.wire = kF16;
    spec.wire_scale = 0.25;
    BucketInMemory x(spec);
    std::fill_n(x.b.bad, 1, uint8_t{0});
    std::fill_n(x.b.outcome, 1, Outcome::kNormal);
    x.pick_at_random();
    auto* e = static_cast<float*>(x.b.own_a);
    e[0] = 1e6f;
    e[39] = -3e38f;
    cpu::kernels_with(*table).pack(x.b, cpu::PackMode::kBoth);
    EXPECT_EQ(x.second(0), 65504 / 4);
    EXPECT_EQ(x.second(39), -65504 / 4);
    EXPECT_EQ(e[0], 1e6f - 65504);
    EXPECT_EQ(e[39], -3e38f);
  }
}

}  // namespace
}  // namespace arc_topk::testing
