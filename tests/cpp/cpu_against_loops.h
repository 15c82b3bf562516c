// Each of the CPU's kernels against a plain loop over elements, in double with a rounding wherever
// the kernel rounds; for every instruction set that this machine has, and all of them against each
// other bit by bit. What the tests of single kernels (test_cpu_*.cpp) share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "bucket_in_memory.h"
#include "kernels/cpu/kernels.h"

namespace arc_topk::testing {

using enum DType;
inline constexpr double kInf = std::numeric_limits<double>::infinity();

// --- what is tested ------------------------------------------------------------------------------

// Matrices of all the shapes that take their own way through the kernels.
std::vector<Tensor> odd_tensors();

// The same as Top-K sees it.
BucketSpec by_element(BucketSpec spec);

std::string describe(const cpu::Rows& table, const BucketSpec& spec);

// One for each instruction set that this machine has, the best last.
std::vector<const cpu::Rows*> all_tables();
const cpu::CpuKernels& best();

using Check = std::function<void(const cpu::CpuKernels&, BucketInMemory&)>;

// Runs the check with every table; what it leaves in memory must be the same bits for all of them.
void for_every_table(const BucketSpec& spec, const Check& check);
// The same over every feedback and every combination of types.
void for_everything(const Check& check);

// --- the plain loops -----------------------------------------------------------------------------

// One element of gradient and state.
struct Element {
  double g, a, b;
};

struct Scalar {
  explicit Scalar(const Bucket& bucket) : b(bucket), work(work_type(bucket.gradient_type)) {}

  double w(double x) const { return rounded(work, x); }
  double s(double x) const { return rounded(b.state_type, x); }

  double prepare(Element& e) const {
    const double keep = w(1 - b.eta), eta = w(b.eta);
    switch (b.feedback) {
      case FeedbackKind::kNone:
        return e.g;
      case FeedbackKind::kEF14:
        return e.a = s(w(e.a + e.g));
      case FeedbackKind::kEF21:
        return w(e.g - e.a);
      case FeedbackKind::kEF21M:
        return e.a = s(w(w(keep * e.a) + w(eta * w(e.g - e.b))));
    }
    return NAN;
  }
  double message(const Element& e) const {
    if (b.feedback == FeedbackKind::kNone) return e.g;
    return b.feedback == FeedbackKind::kEF21 ? w(e.g - e.a) : e.a;
  }
  void sent(double c, Element& e) const {
    if (b.feedback == FeedbackKind::kEF21) e.a = s(w(e.a + c));
    if (b.feedback == FeedbackKind::kEF14 || b.feedback == FeedbackKind::kEF21M)
      e.a = s(w(e.a - c));
    if (b.feedback == FeedbackKind::kEF21M) e.b = s(w(e.b + c));
  }
  // The wire's value of a message.
  double wire(double x) const {
    const double limit = b.wire_type == kF16   ? 65504
                         : b.wire_type == kF32 ? 3.4028234663852886e38
                                               : 1e300;
    return rounded(b.wire_type, w(std::clamp(x, -limit, limit) * b.wire_scale));
  }
  double mean(double sum) const { return w(sum * w(1 / b.wire_scale / b.world_size)); }

  const Bucket& b;
  const DType work;
};

// Elements of a bucket as they are.
Element element(const BucketInMemory& x, int64_t i);
std::vector<Element> elements(const BucketInMemory& x);

void expect_state(const BucketInMemory& x, int64_t i, const Element& expected);

bool is_picked(const BucketInMemory& x, const Segment& s, int64_t row);

// --- outcomes and results ------------------------------------------------------------------------

// Tensor 4 is used nowhere, tensor 8 is not finite here, tensor 11 elsewhere.
void mark_some(const BucketInMemory& x);

// The outcomes that apply() itself has to find: tensor 5 zero everywhere, tensor 14 not finite.
Outcome dense_outcome(const Bucket& b, int64_t index);

// h, where the bucket has one.
std::vector<double> shared_values(const BucketInMemory& x);

// publish() after apply(): h, NaN, or zeros.
void check_published(const cpu::CpuKernels& kernels, const BucketInMemory& x);

}  // namespace arc_topk::testing
