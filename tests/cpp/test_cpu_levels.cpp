// The uint8 wire: levels, units and their kernels against plain loops.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu_against_loops.h"
#include "kernels/levels.h"

namespace arc_topk::testing {
namespace {

// --- the codec alone -----------------------------------------------------------------------------

Bucket bucket_of(int world_size, int rank = 0) {
  Bucket b{};
  b.wire_type = kU8;
  b.rank = rank;
  b.world_size = world_size;
  return b;
}

template <class T>
class LevelsOf : public ::testing::Test {};
using WorkTypes = ::testing::Types<float, double>;
TYPED_TEST_SUITE(LevelsOf, WorkTypes);

// L = floor(255 / N) + 1 levels, one less where that is even.
TEST(Levels, AreOddInNumberAndTheirSumFitsAByte) {
  for (int n = 1; n <= kMostRanksOfLevels; ++n) {
    const int levels = 255 / n + 1;
    EXPECT_EQ(2 * most_level(n) + 1, levels % 2 == 0 ? levels - 1 : levels);
    EXPECT_LE(2 * most_level(n) * n, 255);
    EXPECT_GE(most_level(n), 3);
    if (n > 1) {
      EXPECT_GE(kBestStep[n - 1], kBestStep[n - 2]);
    }
  }
}

TYPED_TEST(LevelsOf, NoSumOfBytesOverflowsWhateverIsSent) {
  using T = TypeParam;
  const T largest = std::numeric_limits<T>::max(), smallest = std::numeric_limits<T>::denorm_min();
  for (int n = 1; n <= kMostRanksOfLevels; ++n) {
    const Levels<T> levels(bucket_of(n));
    for (T share : {T(0), smallest, std::numeric_limits<T>::min(), T(1), largest / 2, largest,
                    std::numeric_limits<T>::infinity()}) {
      const T unit = levels.unit(share);
      ASSERT_TRUE(std::isfinite(unit) && std::isfinite(unit * levels.most)) << share;
      const T inverse = Levels<T>::inverse(unit);
      ASSERT_TRUE(std::isfinite(inverse)) << share;
      for (T x : {T(0), smallest, T(0.3), T(1), T(1e9), largest}) {
        for (T signed_x : {x, -x}) {
          const T level = levels.level(signed_x, inverse);
          const int byte = levels.byte(level);
          ASSERT_EQ(byte, level + levels.most);
          ASSERT_LE(byte * n, 255);
          ASSERT_EQ(levels.mean_level(static_cast<T>(byte * n)), level * static_cast<T>(n));
          if (unit == 0) {
            ASSERT_EQ(level, 0);
          }
        }
      }
    }
  }
}

TYPED_TEST(LevelsOf, AreRoundedToNearestEvenAndCutOff) {
  using T = TypeParam;
  const double expected[][2] = {{0.5, 0},   {-0.5, 0},  {1.5, 2},   {2.5, 2},
                                {-2.5, -2}, {0.51, 1},  {30.4, 30}, {30.5, 30},
                                {30.6, 31}, {31.5, 31}, {1e30, 31}, {-31.6, -31}};
  for (int rank = 0; rank < 4; ++rank) {
    const Levels<T> levels(bucket_of(4, rank));
    const double stagger = (rank + 0.5) / 4 - 0.5;
    for (const auto& [x, level] : expected) {
      const auto moved = static_cast<T>((x - stagger) * 0.25);
      EXPECT_EQ(levels.level(moved, T(4)), static_cast<T>(level)) << x << ", rank " << rank;
    }
    EXPECT_EQ(levels.level(T(0), T(4)), T(0));
  }
}

// The same x on all ranks: as if it had been rounded once, N times as finely.
TYPED_TEST(LevelsOf, StaggeredThresholdsAddUpToFinerLevels) {
  using T = TypeParam;
  std::mt19937 random(5);
  for (int n = 1; n <= kMostRanksOfLevels; ++n) {
    for (int i = 0; i < 200; ++i) {
      const T most = static_cast<T>(most_level(n)) - 1;
      const T x = std::uniform_real_distribution<T>(-most, most)(random);
      T sum = 0;
      for (int rank = 0; rank < n; ++rank) sum += Levels<T>(bucket_of(n, rank)).level(x, T(1));
      ASSERT_LE(std::abs(sum - x * static_cast<T>(n)), T(0.501)) << n << " ranks, x " << x;
    }
  }
}

// So what is sent is exact, and what stays of what was not cut off is but for its own rounding.
TYPED_TEST(LevelsOf, AProductOfUnitAndLevelIsExact) {
  using T = TypeParam;
  std::mt19937 random(3);
  for (int n = 1; n <= kMostRanksOfLevels; ++n) {
    const Levels<T> levels(bucket_of(n));
    for (int i = 0; i < 300; ++i) {
      const auto normal = [&] { return std::normal_distribution<double>()(random); };
      const T sum = static_cast<T>(std::exp(10 * normal()));
      const T unit = levels.unit(sum);
      ASSERT_GE(unit, sum * (1 - std::ldexp(T(1), 9 - std::numeric_limits<T>::digits)));
      ASSERT_LE(unit, sum);
      const T x = static_cast<T>(30 * normal()) * unit;
      const T level = levels.level(x, Levels<T>::inverse(unit));
      const auto exactly = static_cast<long double>(level) * static_cast<long double>(unit);
      ASSERT_EQ(static_cast<long double>(level * unit), exactly);
      if (std::abs(level) < levels.most) {
        const T rest = x - level * unit;
        const long double lost = static_cast<long double>(rest) - (x - exactly);
        ASSERT_LE(std::abs(lost), unit * std::numeric_limits<T>::epsilon());
        ASSERT_LE(std::abs(rest), unit * T(1.0001));
      }
    }
  }
}

// --- its kernels ---------------------------------------------------------------------------------

// As levels.h says it, in double with a rounding wherever the kernels round.
struct Codec {
  explicit Codec(const Bucket& bucket) : b(bucket), scalar(bucket), h(127 / bucket.world_size) {}

  double unit(double sum) const {
    const bool single = scalar.work == kF32;
    const int digits = single ? 24 : 53;
    const double smallest = single ? 0x1p-126 : 0x1p-1022;
    const double largest = single ? std::numeric_limits<float>::max() : 1.7976931348623157e308;
    if (!(sum >= smallest)) return 0;
    int exponent = 0;
    const double mantissa =
        std::frexp(std::min(sum, scalar.w(largest / scalar.w(h + 1.0))), &exponent);
    const double kept = std::floor(std::ldexp(mantissa, digits - 8));
    return std::ldexp(kept, exponent - (digits - 8));
  }
  double level(double x, double its_unit) const {
    if (its_unit == 0) return 0;
    const double stagger = scalar.w((b.rank + 0.5) / b.world_size - 0.5);
    const double y = scalar.w(scalar.w(x * scalar.w(1 / its_unit)) + stagger);
    return std::nearbyint(std::clamp(y, -h, h));
  }
  double mean(double sum, double its_unit) const {
    return scalar.w(scalar.w(its_unit / b.world_size) * (sum - b.world_size * h));
  }

  const Bucket& b;
  const Scalar scalar;
  const double h;
};

void for_all_of_levels(const Check& check) {
  const DType types[][2] = {{kF32, kF32}, {kBF16, kF32}, {kF16, kF32}, {kF32, kBF16}, {kF64, kF64}};
  for (FeedbackKind feedback : kAllFeedback) {
    for (const auto& [gradient, state] : types) {
      for (const int world_size : {1, 3, 32}) {
        BucketSpec spec;
        spec.tensors = odd_tensors();
        for (Tensor& tensor : spec.tensors) tensor.dense_in_first = true;
        spec.feedback = feedback;
        spec.gradient = gradient;
        spec.state = state;
        spec.wire = kU8;
        spec.world_size = world_size;
        spec.wire_scale = scale_of_sum(world_size);
        for_every_table(spec, check);
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

// A unit of each kind: usual ones, none, too small a sum, too large a one.
void set_units(const BucketInMemory& x) {
  int64_t number = 0;
  const DType work = work_type(x.b.gradient_type);
  for (const Segment& s : x.segments) {
    for (int64_t row = 0; s.compressed() && row < s.rows; ++row) {
      const double usual = 0.01 + 0.003 * static_cast<double>(++number % 37);
      const double odd[] = {0, 1e-45, work == kF32 ? 3e38 : 1e308};
      set(work, x.b.first, s.units(x.b.sketch_dim) + row,
          number % 11 < 3 ? odd[number % 11] : usual);
    }
  }
}

TEST(CpuLevels, EachRowsShareIsOfTheElementsThatItHas) {
  for_all_of_levels([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    const Projection v = x.projection();
    const Scalar scalar(x.b);
    std::vector<Element> before = elements(x);
    kernels.update(x.b, &v);
    const double tolerance = x.b.gradient_type == kF64 ? 1e-14 : 1e-7;
    for (const Segment& s : x.segments) {
      for (int64_t row = 0; s.compressed() && row < s.rows; ++row) {
        double squares = 0;
        int64_t count = 0;
        for (int64_t i = row * s.cols; i < std::min(s.numel, (row + 1) * s.cols); ++i, ++count) {
          const double message = scalar.prepare(before[static_cast<size_t>(s.offset + i)]);
          squares += message * message;
        }
        const double c = kBestStep[x.b.world_size - 1];
        const double share = c / x.b.world_size * std::sqrt(squares / static_cast<double>(count));
        ASSERT_NEAR(x.first(s.units(x.b.sketch_dim) + row), share, tolerance * share)
            << "row " << row << " of " << s.cols << " columns";
      }
    }
  });
}

TEST(CpuLevels, NoSquareIsTooLargeOrTooSmallForAFloat) {
  for (const double size : {1e-40, 1e-30, 1e25, 3e38}) {
    BucketSpec spec;
    spec.tensors = {{40, 20, 1}};
    spec.wire = kU8;
    BucketInMemory x(spec);
    for (int64_t i = 0; i < 40; ++i) x.set_gradient(i, i % 2 == 0 ? size : -size);
    const Projection v = x.projection();
    best().update(x.b, &v);
    EXPECT_NEAR(x.first(x.segments[0].units(x.b.sketch_dim)), kBestStep[2] / 3 * size, 1e-4 * size);
  }
}

TEST(CpuLevels, AFusedLoopsRowsHaveTheSameShares) {
  for (FeedbackKind feedback : kAllFeedback) {
    for (DType type : {kF32, kF64}) {
      BucketSpec spec;
      spec.tensors = {
          {9 * 1100 + 40, 1100, 3}, {8 * 1040, 1040, 2}, {12 * 32, 32, 4}, {7 * 45 + 1, 45, 4}};
      spec.feedback = feedback;
      spec.gradient = spec.state = type;
      spec.wire = kU8;
      spec.piece_numel = 1 << 20;
      for_every_table(spec, [](const cpu::CpuKernels& kernels, BucketInMemory& x) {
        const Projection v = x.projection();
        kernels.prepare(x.b, &v);
      });
    }
  }
}

// Payload and state behind packing.
void check_packed(const BucketInMemory& x, const std::vector<Element>& before, bool payload,
                  bool state) {
  const Codec codec(x.b);
  for (int64_t index = 0; index < x.b.num_segments; ++index) {
    const Segment& s = x.segments[static_cast<size_t>(index)];
    const bool sends = !x.b.bad[index] && x.b.outcome[index] == Outcome::kNormal;
    for (int64_t k = 0; k < s.kept; ++k) {
      const int64_t row = x.b.picks[s.pick + k];
      const double unit = codec.unit(x.first(s.units(x.b.sketch_dim) + row));
      for (int64_t c = 0; c < s.cols; ++c) {
        const int64_t i = row * s.cols + c;
        double level = 0;
        if (i < s.numel && sends) {
          Element e = before[static_cast<size_t>(s.offset + i)];
          level = codec.level(codec.scalar.message(e), unit);
          ASSERT_EQ(codec.scalar.w(level * unit), level * unit);
          if (state) codec.scalar.sent(level * unit, e);
          expect_state(x, s.offset + i, e);
        }
        if (payload) {
          ASSERT_EQ(x.second(s.packed + k * s.cols + c), level + codec.h) << "segment " << index;
        }
      }
    }
    for (int64_t i = 0; s.compressed() && i < s.numel; ++i) {
      if (!sends || !is_picked(x, s, i / s.cols))
        expect_state(x, s.offset + i, before[static_cast<size_t>(s.offset + i)]);
    }
  }
}

TEST(CpuLevels, PackFillsThePayloadAndAccountsForIt) {
  for_all_of_levels([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    mark_some(x);
    x.pick_at_random();
    set_units(x);
    const std::vector<Element> before = elements(x);
    kernels.pack(x.b, cpu::PackMode::kPayload);
    std::vector<double> payload;
    for (int64_t i = 0; i < x.second_numel; ++i) payload.push_back(x.second(i));
    kernels.pack(x.b, cpu::PackMode::kCommit);
    check_packed(x, before, false, true);
    for (int64_t index = 0; index < x.b.num_segments; ++index) {
      const Segment& s = x.segments[static_cast<size_t>(index)];
      for (int64_t i = s.packed;
           x.b.outcome[index] == Outcome::kNormal && i < s.packed + s.kept * s.cols; ++i)
        ASSERT_EQ(payload[static_cast<size_t>(i)], x.second(i));
    }
  });
  for_all_of_levels([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    mark_some(x);
    x.pick_at_random();
    set_units(x);
    const std::vector<Element> before = elements(x);
    kernels.pack(x.b, cpu::PackMode::kBoth);
    check_packed(x, before, true, true);
  });
}

// C of element i of a segment; 0 outside of the picked rows.
double mean_at(const BucketInMemory& x, const Segment& s, int64_t i) {
  const Codec codec(x.b);
  const int32_t* picks = x.b.picks + s.pick;
  const int64_t row = i / s.cols;
  if (!is_picked(x, s, row)) return 0;
  const auto k = std::lower_bound(picks, picks + s.kept, static_cast<int32_t>(row)) - picks;
  const double sum = x.second(s.packed + k * s.cols + i % s.cols);
  return codec.mean(sum, codec.unit(x.first(s.units(x.b.sketch_dim) + row)));
}

TEST(CpuLevels, ApplyPutsTheMeanWhereItBelongs) {
  for_all_of_levels([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    mark_some(x);
    x.pick_at_random();
    set_units(x);
    const std::vector<double> h = shared_values(x);
    kernels.apply_reduced(x.b);
    const Scalar scalar(x.b);
    for (int64_t index = 0; index < x.b.num_segments; ++index) {
      const Segment& s = x.segments[static_cast<size_t>(index)];
      if (!s.compressed() || x.b.outcome[index] != Outcome::kNormal) continue;
      for (int64_t i = 0; i < s.numel; ++i) {
        const double mean = mean_at(x, s, i);
        if (shares_estimate(x.b.feedback)) {
          const double before = h[static_cast<size_t>(s.offset + i)];
          ASSERT_EQ(x.shared(s.offset + i), scalar.s(scalar.w(before + mean)));
        } else {
          ASSERT_EQ(x.gradient(s.offset + i), rounded(x.b.gradient_type, mean));
        }
      }
    }
  });
}

TEST(CpuLevels, ReclaimPutsTheMeanOfTheSentRowsBack) {
  for_all_of_levels([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    if (x.b.feedback != FeedbackKind::kEF14) return;
    const double now[] = {2, .5}, before[] = {4, .25};
    x.b.loss_scale = now;
    x.b.scale_before = before;
    mark_some(x);
    x.pick_at_random();
    set_units(x);
    const Scalar scalar(x.b);
    const std::vector<Element> old = elements(x);
    kernels.reclaim(x.b);
    for (int64_t index = 0; index < x.b.num_segments; ++index) {
      const Segment& s = x.segments[static_cast<size_t>(index)];
      for (int64_t i = 0; i < s.numel; ++i) {
        Element expected = old[static_cast<size_t>(s.offset + i)];
        if (s.compressed() && x.b.outcome[index] == Outcome::kNormal &&
            is_picked(x, s, i / s.cols)) {
          const double sum = scalar.s(scalar.w(expected.a + mean_at(x, s, i)));
          if (std::isfinite(sum)) expected.a = sum;
        }
        expect_state(x, s.offset + i, expected);
      }
    }
    x.b.loss_scale = x.b.scale_before = nullptr;
  });
}

}  // namespace
}  // namespace arc_topk::testing
