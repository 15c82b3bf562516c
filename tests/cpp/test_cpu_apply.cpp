// apply() and publish(): the mean of what all ranks sent, where it belongs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "cpu_against_loops.h"

namespace arc_topk::testing {
namespace {

// Result and energy, where sum(segment, i) is what arrived for element i of it, summed over ranks.
using Sum = std::function<double(const Segment&, int64_t)>;

double check_compressed_result(const BucketInMemory& x, const Segment& s, Outcome outcome,
                               const Sum& sum, const std::vector<double>& h_before) {
  const Scalar scalar(x.b);
  double energy = 0;
  for (int64_t i = 0; i < s.numel; ++i) {
    const double mean = outcome == Outcome::kNormal ? scalar.mean(sum(s, i)) : 0;
    energy += mean * mean;
    if (shares_estimate(x.b.feedback)) {
      EXPECT_EQ(x.shared(s.offset + i), scalar.s(scalar.w(h_before[s.offset + i] + mean)));
    } else if (outcome == Outcome::kNonFinite) {
      EXPECT_TRUE(std::isnan(x.gradient(s.offset + i)));
    } else {
      EXPECT_EQ(x.gradient(s.offset + i), rounded(x.b.gradient_type, mean));
    }
  }
  return energy;
}

void check_dense_result(const BucketInMemory& x, const Segment& s, Outcome outcome, const Sum& sum,
                        const std::vector<double>& h_before) {
  const Scalar scalar(x.b);
  for (int64_t i = 0; i < s.numel; ++i) {
    const double mean = scalar.mean(sum(s, i));
    const double h = shares_estimate(x.b.feedback) ? h_before[s.offset + i] : 0;
    if (x.b.feedback == FeedbackKind::kEF21M) {
      const double keep = scalar.w(1 - x.b.eta), eta = scalar.w(x.b.eta);
      const double blended = scalar.s(scalar.w(scalar.w(keep * h) + scalar.w(eta * mean)));
      EXPECT_EQ(x.shared(s.offset + i), outcome == Outcome::kNormal ? blended : h);
    } else if (x.b.feedback == FeedbackKind::kEF21) {
      EXPECT_EQ(x.shared(s.offset + i), outcome == Outcome::kNonFinite ? h : scalar.s(mean));
    } else if (std::isfinite(mean)) {
      EXPECT_EQ(x.gradient(s.offset + i), rounded(x.b.gradient_type, mean));
    } else {
      EXPECT_FALSE(std::isfinite(x.gradient(s.offset + i)));
    }
  }
}

void check_applied(const BucketInMemory& x, double energy, const Sum& sum,
                   const std::vector<double>& h_before) {
  double expected = 0;
  for (int64_t i = 0; i < x.b.num_segments; ++i) {
    const Segment& s = x.segments[i];
    if (s.compressed()) {
      expected += check_compressed_result(x, s, x.b.outcome[i], sum, h_before);
    } else if (s.numel > 0) {
      if (shares_estimate(x.b.feedback)) {
        EXPECT_EQ(x.b.outcome[i], dense_outcome(x.b, i)) << "segment " << i;
      }
      check_dense_result(x, s, dense_outcome(x.b, i), sum, h_before);
    }
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_NEAR(energy, expected, 1e-6 * expected);
}

void set_dense(const BucketInMemory& x, int64_t index, int64_t i, double value) {
  const Segment& s = x.segments[index];
  if (s.dense_in_first) {
    set(work_type(x.b.gradient_type), x.b.first, s.packed + i, value);
  } else {
    set(x.b.wire_type, x.b.second, s.packed + i, value);
  }
}

// What lies behind the end of a tensor in its last row, if that was picked, as pack() sends it.
void zero_padding(const BucketInMemory& x) {
  for (const Segment& s : x.segments) {
    const bool picked = s.compressed() && x.b.picks[s.pick + s.kept - 1] == s.rows - 1;
    for (int64_t i = s.numel; picked && i < s.rows * s.cols; ++i) {
      const int64_t column = i - (s.rows - 1) * s.cols;
      set(x.b.wire_type, x.b.second, s.packed + (s.kept - 1) * s.cols + column, 0);
    }
  }
}

TEST(CpuApply, PutsTheMeanWhereItBelongs) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    mark_some(x);
    x.pick_at_random();
    zero_padding(x);
    for (int64_t i = 0; i < 7; ++i) set_dense(x, 5, i, 0);
    set_dense(x, 14, 3, NAN);
    const std::vector<double> h = shared_values(x);
    const double energy = kernels.apply_reduced(x.b);
    const Sum sum = [&](const Segment& s, int64_t i) {
      if (!s.compressed()) return s.dense_in_first ? x.first(s.packed + i) : x.second(s.packed + i);
      const int32_t* picks = x.b.picks + s.pick;
      const int32_t* at = std::lower_bound(picks, picks + s.kept, i / s.cols);
      const bool picked = at < picks + s.kept && *at == i / s.cols;
      return picked ? x.second(s.packed + (at - picks) * s.cols + i % s.cols) : 0.0;
    };
    check_applied(x, energy, sum, h);
    check_published(kernels, x);
  });
}

// A message of bytes as Top-K lays it out, odd in length, from three ranks that each picked for
// itself.
TEST(CpuApply, AveragesGatheredMessages) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    if (x.b.wire_type != x.b.gradient_type) return;
    const BucketSpec spec = by_element(x.spec);
    BucketInMemory y(spec);
    const int64_t first_bytes = y.first_numel * size_of(work_type(spec.gradient));
    const int64_t second_bytes = y.second_numel * size_of(spec.wire);
    int64_t picks = 0;
    for (const Segment& s : y.segments) picks += s.kept;
    const int64_t bytes = first_bytes + second_bytes + 4 * picks + 1;
    std::vector<char> gathered(3 * bytes);
    const std::vector<double> h = shared_values(y);
    std::vector<double> sums(y.b.numel, 0.0);
    const DType work = work_type(spec.gradient);
    for (int rank = 0; rank < 3; ++rank) {
      y.pick_at_random();
      for (int64_t i = 0; i < y.second_numel; ++i)
        set(spec.wire, y.b.second, i, (i + rank) % 13 - 6);
      for (int64_t i = 0; i < 7; ++i) set_dense(y, 5, i, 0);
      set_dense(y, 14, 3, rank == 1 ? kInf : 1);
      for (const Segment& s : y.segments) {
        for (int64_t k = 0; k < s.kept; ++k) {
          sums[s.offset + y.b.picks[s.pick + k]] += y.second(s.packed + k);
        }
        for (int64_t i = 0; !s.compressed() && i < s.numel; ++i) {
          double& sum = sums[s.offset + i];
          sum = rounded(work,
                        sum + (s.dense_in_first ? y.first(s.packed + i) : y.second(s.packed + i)));
        }
      }
      char* at = gathered.data() + rank * bytes;
      std::memcpy(at, y.b.first, first_bytes);
      std::memcpy(at + first_bytes, y.b.picks, 4 * picks);
      std::memcpy(at + first_bytes + 4 * picks, y.b.second, second_bytes);
    }
    std::vector<char> message(bytes);
    y.b.first = message.data();
    y.b.picks = reinterpret_cast<int32_t*>(message.data() + first_bytes);
    y.b.second = message.data() + first_bytes + 4 * picks;
    mark_some(y);
    const double energy = kernels.apply_gathered(y.b, {message.data(), gathered.data(), bytes});
    check_applied(
        y, energy, [&](const Segment& s, int64_t i) { return sums[s.offset + i]; }, h);
    check_published(kernels, y);
  });
}

// A bucket that no cache holds is written past the caches: here one that only claims to be large.
TEST(CpuApply, PastTheCachesTheGradientIsTheSame) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& small) {
    BucketInMemory large(small.spec);
    for (BucketInMemory* x : {&small, &large}) {
      mark_some(*x);
      x->pick_at_random();
    }
    large.b.numel = int64_t{1} << 40;
    for (BucketInMemory* x : {&small, &large}) {
      kernels.apply_reduced(x->b);
      if (x->b.shared != nullptr) kernels.publish(x->b);
    }
    EXPECT_EQ(large.contents(), small.contents());
  });
}

// Rows around a run that is worth it, and around lines, at every offset from one.
TEST(CpuApply, PastTheCachesEveryRowIsWhereItBelongs) {
  for (const cpu::Rows* table : all_tables()) {
    const cpu::CpuKernels& kernels = cpu::kernels_with(*table);
    for (const int64_t cols : {1, 15, 16, 127, 128, 129, 1024, 1025, 2500}) {
      for (int64_t shift = 0; shift < 16; ++shift) {
        BucketSpec spec;
        spec.tensors = {{shift}, {7 * cols, cols, 3}, {5 * cols - (cols > 1), cols, 5}, {3}};
        BucketInMemory small(spec), large(spec);
        large.b.numel = int64_t{1} << 40;
        for (BucketInMemory* x : {&small, &large}) {
          std::fill_n(x->b.outcome, x->b.num_segments, Outcome::kNormal);
          x->pick_at_random();
          kernels.apply_reduced(x->b);
        }
        ASSERT_EQ(large.contents(), small.contents()) << cols << " columns, shift " << shift;
      }
    }
  }
}

// Where all is normal only whoever wants the result in the bucket has it copied there.
TEST(CpuApply, PublishesIntoTheGradientWhereThatIsWanted) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    if (!shares_estimate(x.b.feedback)) return;
    std::fill_n(x.b.outcome, x.b.num_segments, Outcome::kNormal);
    const bool same_type = x.b.state_type == x.b.gradient_type;
    EXPECT_EQ(kernels.publish(x.b), x.b.result_in_gradient || !same_type);
    x.b.result_in_gradient = true;
    EXPECT_TRUE(kernels.publish(x.b));
    for (int64_t i = 0; i < x.b.numel; ++i)
      ASSERT_EQ(x.gradient(i), rounded(x.b.gradient_type, x.shared(i)));
  });
}

}  // namespace
}  // namespace arc_topk::testing
