// Each kernel against a plain loop over elements, in double with a rounding wherever the kernel
// rounds; for every instruction set that this machine has, and all of them against each other bit
// by bit.
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "bucket_in_memory.h"
#include "kernels/cpu/kernels.h"
#include "random.h"

namespace arc_topk {
namespace {

using testing::BucketInMemory;
using testing::BucketSpec;
using testing::rounded;
using testing::Tensor;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16, kF16 = DType::kF16;
constexpr double kInf = std::numeric_limits<double>::infinity();

// --- what is tested
// ---------------------------------------------------------------------------------

// Matrices of all the shapes that take their own way through the kernels.
std::vector<Tensor> odd_tensors() {
  return {
      {1, 1, 1},               // one element
      {0, 1, 0},               // none
      {7, 1, 3},               // one column
      {7, 7, 1},               // one row
      {33, 5, 3},              // a short last row
      {7, 1, 0},               // dense, first payload
      {130, 13, 10},           // all rows
      {1030, 1, 0, false},     // dense, second payload
      {16 * 40, 16, 9},        // no tail
      {37 * 64 - 63, 64, 20},  // one element in the last row
      {3 * 600, 600, 2},       // rows longer than a chunk
      {1100 + 100, 1100, 2},   // the last of which ends in its first chunk
      {2 * 513, 513, 1},       // one element in the last chunk
      {1000, 1, 120},          // enough picks for several chunks
      {5, 1, 0, false},        // dense
      {2500 + 100, 2500, 2},   // most chunks of whose last row lie beyond its end
      {40, 8, 2},
  };
}

std::vector<BucketSpec> specs(FeedbackKind feedback) {
  struct Types {
    DType gradient, state, wire;
    double scale = 1;
  };
  std::vector<BucketSpec> all;
  for (const Types& t :
       {Types{kF32, kF32, kF32}, Types{kF32, kF32, kBF16}, Types{kF32, kF32, kF16, 0.25},
        Types{kF32, kBF16, kF32}, Types{kBF16, kF32, kBF16}, Types{kF16, kF32, kF16, 0.25},
        Types{kBF16, kBF16, kF32}, Types{kF64, kF64, kF64}, Types{kF64, kF64, kF32},
        Types{kF64, kF64, kF16, 0.25}}) {
    BucketSpec spec;
    spec.tensors = odd_tensors();
    spec.feedback = feedback;
    spec.gradient = t.gradient;
    spec.state = t.state;
    spec.wire = t.wire;
    spec.wire_scale = t.scale;
    all.push_back(spec);
    if (!shares_estimate(feedback)) continue;
    spec.may_be_unused = false;
    spec.result_in_gradient = true;
    all.push_back(spec);
  }
  return all;
}

// The same as Top-K sees it.
BucketSpec by_element(BucketSpec spec) {
  for (Tensor& tensor : spec.tensors) {
    if (tensor.kept > 0) tensor = {tensor.numel, 1, (tensor.numel + 4) / 5};
  }
  return spec;
}

constexpr FeedbackKind kAllFeedback[] = {FeedbackKind::kNone, FeedbackKind::kEF14,
                                         FeedbackKind::kEF21, FeedbackKind::kEF21M};

std::string describe(const cpu::Rows& table, const BucketSpec& s) {
  const auto name = [](DType type) {
    return type == kF32 ? "f32" : type == kF64 ? "f64" : type == kBF16 ? "bf16" : "f16";
  };
  return std::string(table.isa) + ", feedback " + std::to_string(static_cast<int>(s.feedback)) +
         ", gradient " + name(s.gradient) + ", state " + name(s.state) + ", wire " + name(s.wire);
}

std::vector<const cpu::Rows*> all_tables() {
  const cpu::Rows* found[cpu::kMaxTables];
  return {found, found + cpu::tables(found)};
}

const cpu::CpuKernels& best() { return cpu::kernels_with(*all_tables().back()); }

using Check = std::function<void(const cpu::CpuKernels&, BucketInMemory&)>;

// Runs the check over every feedback, every combination of types and every table; what it leaves in
// memory must be the same bits for every table.
void for_everything(const Check& check) {
  for (FeedbackKind feedback : kAllFeedback) {
    for (const BucketSpec& spec : specs(feedback)) {
      std::vector<std::vector<unsigned char>> baseline;
      for (const cpu::Rows* table : all_tables()) {
        SCOPED_TRACE(describe(*table, spec));
        BucketInMemory x(spec);
        check(cpu::kernels_with(*table), x);
        if (baseline.empty()) baseline = x.contents();
        EXPECT_EQ(x.contents(), baseline) << "not the bits of " << all_tables()[0]->isa;
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

// --- the plain loops
// --------------------------------------------------------------------------------

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
  double mean(double sum, bool in_first) const {
    return w(sum * w(1 / (in_first ? 1.0 : b.wire_scale) / b.world_size));
  }

  const Bucket& b;
  const DType work;
};

// Reads an element of a bucket as it is.
Element element(const BucketInMemory& x, int64_t i) {
  return {x.gradient(i), x.own_a(i), x.own_b(i)};
}

std::vector<Element> elements(const BucketInMemory& x) {
  std::vector<Element> all;
  for (int64_t i = 0; i < x.b.numel; ++i) all.push_back(element(x, i));
  return all;
}

void expect_state(const BucketInMemory& x, int64_t i, const Element& expected) {
  ASSERT_EQ(x.own_a(i), x.b.own_a ? expected.a : 0) << "own_a at " << i;
  ASSERT_EQ(x.own_b(i), x.b.own_b ? expected.b : 0) << "own_b at " << i;
}

bool is_picked(const BucketInMemory& x, const Segment& s, int64_t row) {
  const int32_t* picks = x.b.picks + s.pick;
  return std::binary_search(picks, picks + s.kept, static_cast<int32_t>(row));
}

bool none_of_it(const unsigned char* marks, int64_t count) {
  return std::all_of(marks, marks + count, [](unsigned char mark) { return mark == 0; });
}

// --- V
// ----------------------------------------------------------------------------------------------

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

// --- number types
// -----------------------------------------------------------------------------------

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
        const double expected = testing::decode_16_bits(type, static_cast<uint16_t>(i));
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
      const double low = testing::decode_16_bits(type, static_cast<uint16_t>(bits));
      const double high = testing::decode_16_bits(type, static_cast<uint16_t>(bits + 1));
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

// --- scan, flags
// ------------------------------------------------------------------------------------

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
        EXPECT_EQ(testing::get(type, b.flags, i), expected);
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
      testing::set(type, b.flags, 0, 0);
      testing::set(type, b.flags, 1, 2);
      testing::set(type, b.flags, 2, bad);
      best().read_flags(b, b.flags, 1, 0);
      expect_outcomes();
    }
  }
}

// --- prepare
// ----------------------------------------------------------------------------------------

// What prepare() should put into the first payload for one row.
void expect_sketch(const BucketInMemory& x, const Segment& s, int64_t row, const Projection& v,
                   const std::vector<double>& message) {
  const double epsilon = x.b.gradient_type == kF64 ? 2e-16 : 1e-7;
  for (int64_t k = 0; k < x.b.sketch_dim; ++k) {
    double sum = 0, size = 0;
    for (size_t c = 0; c < message.size(); ++c) {
      const double product = message[c] * v.data[k * v.stride + static_cast<int64_t>(c)];
      sum += product;
      size += std::abs(product);
    }
    const double root = std::sqrt(static_cast<double>(x.b.sketch_dim));
    ASSERT_NEAR(x.first(s.sketch + row * x.b.sketch_dim + k), sum / root,
                epsilon * size * (4 + std::sqrt(static_cast<double>(message.size()))))
        << "row " << row << " of " << s.cols << " columns, k = " << k;
  }
}

void check_prepared(const BucketInMemory& x, const Projection* v, std::vector<Element> before) {
  const Scalar scalar(x.b);
  for (size_t index = 0; index < x.segments.size(); ++index) {
    const Segment& s = x.segments[index];
    if (!s.compressed()) {
      for (int64_t i = 0; i < s.numel; ++i) {
        const double g = x.gradient(s.offset + i);
        const double copy = s.dense_in_first ? x.first(s.packed + i) : x.second(s.packed + i);
        ASSERT_EQ(copy,
                  s.dense_in_first ? g : rounded(x.b.wire_type, scalar.w(g * x.b.wire_scale)));
        expect_state(x, s.offset + i, before[s.offset + i]);
      }
      continue;
    }
    for (int64_t row = 0; row < s.rows; ++row) {
      std::vector<double> message;
      for (int64_t i = row * s.cols; i < std::min(s.numel, (row + 1) * s.cols); ++i) {
        Element e = before[s.offset + i];
        message.push_back(scalar.prepare(e));
        expect_state(x, s.offset + i, x.b.used[index] ? e : before[s.offset + i]);
      }
      if (v != nullptr) expect_sketch(x, s, row, *v, message);
    }
  }
}

TEST(CpuPrepare, UpdatesTheStateAndSketches) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    const Projection v = x.projection();
    const std::vector<Element> before = elements(x);
    kernels.update(x.b, &v);
    check_prepared(x, &v, before);
    EXPECT_TRUE(none_of_it(x.b.bad, x.b.num_segments));
  });
}

TEST(CpuPrepare, WithoutASketch) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    const std::vector<Element> before = elements(x);
    kernels.update(x.b, nullptr);
    check_prepared(x, nullptr, before);
  });
}

TEST(CpuPrepare, AnySketchDimension) {
  for (int64_t dim : {1, 2, 3, 4, 5, 7, 64}) {
    for (DType type : {kF32, kF64}) {
      for (const cpu::Rows* table : all_tables()) {
        BucketSpec spec;
        spec.tensors = odd_tensors();
        spec.feedback = FeedbackKind::kEF14;
        spec.gradient = spec.state = type;
        spec.sketch_dim = dim;
        BucketInMemory x(spec);
        const Projection v = x.projection();
        const std::vector<Element> before = elements(x);
        cpu::kernels_with(*table).prepare(x.b, &v);
        check_prepared(x, &v, before);
      }
    }
  }
}

// Without a gradient here, another rank may have one: the message is sketched, settle() decides.
TEST(CpuPrepare, HoldsBackWhatIsUnusedHere) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    const Projection v = x.projection();
    for (int64_t i = 0; i < x.b.num_segments; i += 2) {
      const Segment& s = x.segments[i];
      if (s.compressed()) x.b.used[i] = 0;
      for (int64_t j = 0; j < s.numel; ++j) x.set_gradient(s.offset + j, 0);
    }
    const std::vector<Element> before = elements(x);
    kernels.update(x.b, &v);
    check_prepared(x, &v, before);

    // Some other rank used the tensors of even number that are divisible by four, nobody the rest.
    for (int64_t i = 0; i < x.b.num_segments; ++i) {
      x.b.outcome[i] = x.b.used[i] || i % 4 == 0 ? Outcome::kNormal : Outcome::kUnused;
    }
    kernels.settle(x.b);
    const Scalar scalar(x.b);
    for (int64_t index = 0; index < x.b.num_segments; ++index) {
      const Segment& s = x.segments[index];
      for (int64_t i = s.offset; i < s.offset + s.numel; ++i) {
        Element e = before[i];
        if (s.compressed() && x.b.outcome[index] == Outcome::kNormal) scalar.prepare(e);
        expect_state(x, i, e);
      }
    }
  });
}

TEST(CpuPrepare, NeverStoresANonFiniteStateAndSettleTakesTheRestBack) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    const Projection v = x.projection();
    const double values[] = {NAN, kInf, -kInf};
    for (int64_t i = 0; i < x.b.num_segments; ++i) {
      const Segment& s = x.segments[i];
      if (i % 2 == 0 && s.numel > 0) x.set_gradient(s.offset + s.numel - 1, values[i / 2 % 3]);
    }
    const std::vector<Element> before = elements(x);
    kernels.update(x.b, &v);
    for (int64_t i = 0; i < x.b.num_segments; ++i) {
      const Segment& s = x.segments[i];
      EXPECT_EQ(x.b.bad[i], s.compressed() && i % 2 == 0) << "segment " << i;
      x.b.outcome[i] = x.b.bad[i] ? Outcome::kNonFinite : Outcome::kNormal;
      for (int64_t j = s.offset; j < s.offset + s.numel; ++j) {
        ASSERT_TRUE(std::isfinite(x.own_a(j)) && std::isfinite(x.own_b(j))) << "segment " << i;
      }
    }
    kernels.settle(x.b);
    const double unit = x.b.state_type == kBF16  ? 1.0 / 256
                        : x.b.state_type == kF32 ? 6e-8
                                                 : 1.2e-16;
    const double tolerance = 4 * unit * 8 / (1 - x.b.eta);  // no number here is larger than 8
    for (int64_t i = 0; i < x.b.num_segments; ++i) {
      if (!x.b.bad[i]) continue;
      const Segment& s = x.segments[i];
      for (int64_t j = s.offset; j < s.offset + s.numel; ++j) {
        const bool last = j == s.offset + s.numel - 1;
        ASSERT_NEAR(x.own_a(j), before[j].a, last ? 0 : tolerance);
        ASSERT_EQ(x.own_b(j), before[j].b);
      }
    }
  });
}

// Finite gradient, finite state, but their sum is not.
TEST(CpuPrepare, OverflowIsNonFinite) {
  for (const cpu::Rows* table : all_tables()) {
    BucketSpec spec;
    spec.tensors = {{20, 5, 2}};
    spec.feedback = FeedbackKind::kEF14;
    BucketInMemory x(spec);
    static_cast<float*>(x.b.own_a)[3] = 3e38f;
    x.set_gradient(3, 3e38);
    cpu::kernels_with(*table).prepare(x.b, nullptr);
    EXPECT_EQ(x.b.bad[0], 1);
    EXPECT_EQ(x.own_a(3), 3e38f);
    x.b.outcome[0] = Outcome::kNonFinite;
    cpu::kernels_with(*table).settle(x.b);
    EXPECT_EQ(x.own_a(3), 3e38f);
  }
}

// Rows that AVX-512 forms and sketches in one loop, one or four at a time: the loops of the other
// tables, one after the other, must give the same.
std::vector<BucketSpec> long_rows(FeedbackKind feedback) {
  std::vector<BucketSpec> all;
  for (DType type : {kF32, kF64}) {
    for (int64_t dim : {1, 3, 4, 6, 8}) {
      BucketSpec spec;
      spec.tensors = {{9 * 1100 + 40, 1100, 3},  // twice four rows, one, and the start of another
                      {8 * 1040, 1040, 2},       // no tail
                      {5 * 2051 - 1, 2051, 2},   // the last row without the last column
                      {12 * 31, 31, 4},          // too short for it
                      {12 * 32, 32, 4},          // just long enough
                      {7 * 45 + 1, 45, 4},       // one element in the last row
                      {6 * 512 - 500, 512, 2}};
      spec.feedback = feedback;
      spec.gradient = spec.state = spec.wire = type;
      spec.sketch_dim = dim;
      spec.piece_numel = 1 << 20;
      all.push_back(spec);
    }
  }
  return all;
}

TEST(CpuPrepare, FusedLoopGivesTheSameBits) {
  for (FeedbackKind feedback : kAllFeedback) {
    for (const BucketSpec& spec : long_rows(feedback)) {
      std::vector<std::vector<unsigned char>> baseline;
      for (const cpu::Rows* table : all_tables()) {
        SCOPED_TRACE(describe(*table, spec) + ", r " + std::to_string(spec.sketch_dim));
        BucketInMemory x(spec);
        const Projection v = x.projection();
        cpu::kernels_with(*table).prepare(x.b, &v);
        EXPECT_TRUE(none_of_it(x.b.bad, x.b.num_segments));
        if (baseline.empty()) baseline = x.contents();
        ASSERT_EQ(x.contents(), baseline);
      }
    }
  }
}

TEST(CpuPrepare, FusedLoopNeverStoresANonFiniteState) {
  for (FeedbackKind feedback : kAllFeedback) {
    for (const BucketSpec& spec : long_rows(feedback)) {
      for (const cpu::Rows* table : all_tables()) {
        SCOPED_TRACE(describe(*table, spec) + ", r " + std::to_string(spec.sketch_dim));
        BucketInMemory x(spec);
        BucketInMemory finite(spec);
        const std::vector<Element> before = elements(x);
        std::vector<bool> is_bad(before.size());
        const auto spoil = [&](const Segment& s, int64_t i, double value) {
          x.set_gradient(s.offset + i, value);
          is_bad[static_cast<size_t>(s.offset + i)] = true;
        };
        spoil(x.segments[0], 5 * 1100 + 17, NAN);    // a row of four
        spoil(x.segments[1], 8 * 1040 - 1, -kInf);   // the last lane
        spoil(x.segments[2], 3 * 2051 + 2050, NAN);  // the tail of a row of four
        spoil(x.segments[5], 7 * 45, kInf);          // the tail of the last row
        spoil(x.segments[6], 512, NAN);              // the first lane
        const Projection v = x.projection();
        cpu::kernels_with(*table).prepare(x.b, &v);
        cpu::kernels_with(*table).prepare(finite.b, &v);
        const unsigned char bad[] = {1, 1, 1, 0, 0, 1, 1};
        EXPECT_TRUE(std::equal(std::begin(bad), std::end(bad), x.b.bad));
        for (int64_t i = 0; i < x.b.numel; ++i) {
          const bool held = is_bad[static_cast<size_t>(i)];
          expect_state(x, i, held ? before[static_cast<size_t>(i)] : element(finite, i));
        }
      }
    }
  }
}

// --- keys
// -------------------------------------------------------------------------------------------

double key(const BucketInMemory& x, int64_t i) {
  return x.b.gradient_type == kF64 ? static_cast<const double*>(x.b.scratch)[i]
                                   : static_cast<const float*>(x.b.scratch)[i];
}

TEST(CpuScore, IsTheSketchsSquaredLength) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    const Scalar scalar(x.b);
    std::fill_n(x.b.outcome, x.b.num_segments, Outcome::kNormal);
    x.b.outcome[4] = Outcome::kUnused;
    x.b.outcome[6] = Outcome::kNonFinite;
    double expected = 0;
    const double total = kernels.score(x.b);
    for (int64_t i = 0; i < x.b.num_segments; ++i) {
      const Segment& s = x.segments[i];
      if (!s.compressed() || x.b.outcome[i] != Outcome::kNormal) continue;
      for (int64_t row = 0; row < s.rows; ++row) {
        double score = 0;
        for (int64_t k = 0; k < x.b.sketch_dim; ++k) {
          const double p =
              scalar.w(x.first(s.sketch + row * x.b.sketch_dim + k) * scalar.w(1.0 / 3));
          score = scalar.w(score + scalar.w(p * p));
        }
        ASSERT_EQ(key(x, s.key + row), score) << "segment " << i << ", row " << row;
        expected += score;
      }
    }
    EXPECT_NEAR(total, expected, 1e-12 * expected);
  });
}

TEST(CpuScore, NonFiniteSketchesStillGiveValidPicks) {
  for (const cpu::Rows* table : all_tables()) {
    BucketSpec spec;
    spec.tensors = {{50 * 8, 8, 5}};
    BucketInMemory x(spec);
    std::fill_n(x.b.outcome, 1, Outcome::kNormal);
    auto* p = static_cast<float*>(x.b.first);
    p[4 * 7] = NAN;
    p[4 * 9 + 1] = -std::numeric_limits<float>::infinity();
    p[4 * 30] = -std::numeric_limits<float>::quiet_NaN();
    cpu::kernels_with(*table).score(x.b);
    cpu::kernels_with(*table).pick(x.b);
    EXPECT_TRUE(is_picked(x, x.segments[0], 7) && is_picked(x, x.segments[0], 9) &&
                is_picked(x, x.segments[0], 30));
    for (int k = 0; k < 5; ++k) {
      EXPECT_GT(x.b.picks[k], k == 0 ? -1 : x.b.picks[k - 1]);
      EXPECT_LT(x.b.picks[k], 50);
    }
  }
}

TEST(CpuRandomize, IsTheGeneratorsWords) {
  for (DType type : {kF32, kF64}) {
    for (const cpu::Rows* table : all_tables()) {
      BucketSpec spec;
      spec.tensors = {{3000, 1, 5}, {31, 7, 2}};
      spec.gradient = spec.state = type;
      spec.piece_numel = 1001;  // pieces begin within a group of four rows
      BucketInMemory x(spec);
      cpu::kernels_with(*table).randomize(x.b, 11, 22);
      for (const Segment& s : x.segments) {
        for (int64_t row = 0; row < s.rows; ++row) {
          const uint32_t word = selection_keys(row / 4, s.stream, 11, 22).word[row % 4];
          if (type == kF64) {
            ASSERT_EQ(static_cast<const uint64_t*>(x.b.scratch)[s.key + row], word) << table->isa;
          } else {
            ASSERT_EQ(static_cast<const uint32_t*>(x.b.scratch)[s.key + row], word) << table->isa;
          }
        }
      }
    }
  }
}

TEST(CpuMagnitudes, AreThoseOfTheMessage) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& same_types) {
    BucketInMemory x(by_element(same_types.spec));
    const Scalar scalar(x.b);
    x.b.used[2] = 0;  // held back: the message that would have been formed
    const std::vector<Element> before = elements(x);
    kernels.update(x.b, nullptr);
    kernels.magnitudes(x.b);
    for (const Segment& s : x.segments) {
      for (int64_t i = 0; s.compressed() && i < s.numel; ++i) {
        Element e = before[s.offset + i];
        ASSERT_EQ(key(x, s.key + i), std::abs(scalar.prepare(e)));
      }
    }
  });
}

TEST(CpuSelect, PicksEverySegmentsLargest) {
  for (DType type : {kF32, kF64}) {
    BucketSpec spec;
    spec.tensors = odd_tensors();
    spec.gradient = spec.state = type;
    BucketInMemory x(spec);
    std::fill_n(x.b.outcome, x.b.num_segments, Outcome::kNormal);
    best().score(x.b);
    best().pick(x.b);
    for (const Segment& s : x.segments) {
      std::vector<double> picked, left;
      for (int64_t row = 0; s.compressed() && row < s.rows; ++row) {
        (is_picked(x, s, row) ? picked : left).push_back(key(x, s.key + row));
      }
      ASSERT_EQ(static_cast<int64_t>(picked.size()), s.kept);
      if (s.kept == 0 || s.kept == s.rows) continue;
      EXPECT_GE(*std::min_element(picked.begin(), picked.end()),
                *std::max_element(left.begin(), left.end()));
    }
  }
}

// --- pack
// -------------------------------------------------------------------------------------------

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

void mark_some(const BucketInMemory& x) {
  std::fill_n(x.b.bad, x.b.num_segments, uint8_t{0});
  std::fill_n(x.b.outcome, x.b.num_segments, Outcome::kNormal);
  x.b.outcome[4] = Outcome::kUnused;
  x.b.outcome[8] = Outcome::kNonFinite;
  x.b.bad[8] = 1;
  x.b.outcome[11] = Outcome::kNonFinite;
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

    for (int64_t i = 0; i < x.second_numel; ++i)
      testing::set(x.b.wire_type, x.b.second, i, 5);  // reduced
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

TEST(CpuPrepare, DenseCopiesAreNotClamped) {
  for (const cpu::Rows* table : all_tables()) {
    BucketSpec spec;
    spec.tensors = {{40, 1, 0, false}};
    spec.wire = kF16;
    spec.wire_scale = 0.25;
    BucketInMemory x(spec);
    x.set_gradient(0, 1e6);
    x.set_gradient(39, -kInf);
    cpu::kernels_with(*table).prepare(x.b, nullptr);
    EXPECT_EQ(x.second(0), kInf);
    EXPECT_EQ(x.second(39), -kInf);
  }
}

// --- apply
// ------------------------------------------------------------------------------------------

// Result and energy, where sum(segment, i) is what arrived for element i of it, summed over ranks.
using Sum = std::function<double(const Segment&, int64_t)>;

double check_compressed_result(const BucketInMemory& x, const Segment& s, Outcome outcome,
                               const Sum& sum, const std::vector<double>& h_before) {
  const Scalar scalar(x.b);
  double energy = 0;
  for (int64_t i = 0; i < s.numel; ++i) {
    const double mean = outcome == Outcome::kNormal ? scalar.mean(sum(s, i), false) : 0;
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
    const double mean = scalar.mean(sum(s, i), s.dense_in_first);
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

// The outcomes that apply() itself has to find: tensor 5 zero everywhere, tensor 14 not finite.
Outcome dense_outcome(const Bucket& b, int64_t index) {
  if (index == 5 && b.may_be_unused) return Outcome::kUnused;
  return index == 14 ? Outcome::kNonFinite : Outcome::kNormal;
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

std::vector<double> shared_values(const BucketInMemory& x) {
  std::vector<double> h;
  for (int64_t i = 0; x.b.shared && i < x.b.numel; ++i) h.push_back(x.shared(i));
  return h;
}

void set_dense(const BucketInMemory& x, int64_t index, int64_t i, double value) {
  const Segment& s = x.segments[index];
  if (s.dense_in_first) {
    testing::set(work_type(x.b.gradient_type), x.b.first, s.packed + i, value);
  } else {
    testing::set(x.b.wire_type, x.b.second, s.packed + i, value);
  }
}

// What lies behind the end of a tensor in its last row, if that was picked, as pack() sends it.
void zero_padding(const BucketInMemory& x) {
  for (const Segment& s : x.segments) {
    const bool picked = s.compressed() && x.b.picks[s.pick + s.kept - 1] == s.rows - 1;
    for (int64_t i = s.numel; picked && i < s.rows * s.cols; ++i) {
      const int64_t column = i - (s.rows - 1) * s.cols;
      testing::set(x.b.wire_type, x.b.second, s.packed + (s.kept - 1) * s.cols + column, 0);
    }
  }
}

// publish() after apply(): h, NaN, or zeros.
void check_published(const cpu::CpuKernels& kernels, const BucketInMemory& x) {
  if (!shares_estimate(x.b.feedback)) return;
  if (!kernels.publish(x.b)) {  // h as it lies will do
    EXPECT_EQ(x.b.state_type, x.b.gradient_type);
    EXPECT_EQ(std::count(x.b.outcome, x.b.outcome + x.b.num_segments, Outcome::kNormal),
              x.b.num_segments);
    EXPECT_FALSE(x.b.result_in_gradient);
    return;
  }
  for (int64_t index = 0; index < x.b.num_segments; ++index) {
    const Segment& s = x.segments[index];
    for (int64_t i = s.offset; i < s.offset + s.numel; ++i) {
      if (x.b.outcome[index] == Outcome::kNonFinite) {
        ASSERT_TRUE(std::isnan(x.gradient(i)));
      } else if (x.b.outcome[index] == Outcome::kUnused) {
        ASSERT_EQ(x.gradient(i), 0);
      } else {
        ASSERT_EQ(x.gradient(i), rounded(x.b.gradient_type, x.shared(i)));
      }
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
        testing::set(spec.wire, y.b.second, i, (i + rank) % 13 - 6);
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

// --- dense steps
// ------------------------------------------------------------------------------------

TEST(CpuDenseSteps, RememberAndAdoptStartTheEstimates) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    if (!shares_estimate(x.b.feedback)) return;
    const auto expect_all = [&](const std::function<void(int64_t, double)>& check) {
      for (int64_t i = 0; i < x.b.numel; ++i) check(i, rounded(x.b.state_type, x.gradient(i)));
    };
    kernels.remember(x.b);
    expect_all([&](int64_t i, double g) {
      const bool momentum = x.b.feedback == FeedbackKind::kEF21M;
      ASSERT_EQ(x.own_a(i), momentum ? 0 : g);
      if (momentum) {
        ASSERT_EQ(x.own_b(i), g);
      }
    });
    EXPECT_TRUE(kernels.adopt(x.b));
    expect_all([&](int64_t i, double g) { ASSERT_EQ(x.shared(i), g); });

    const double h = x.shared(0);
    x.set_gradient(0, 12);
    x.set_gradient(x.b.numel - 1, kInf);
    EXPECT_FALSE(kernels.adopt(x.b));
    EXPECT_EQ(x.shared(0), h) << "h is left alone";
  });
}

TEST(CpuDenseSteps, BlendIsMomentumOfTheMean) {
  for_everything([](const cpu::CpuKernels& kernels, BucketInMemory& x) {
    if (x.b.feedback != FeedbackKind::kEF21M) return;
    BucketSpec spec = x.spec;
    for (Tensor& tensor : spec.tensors) tensor = {tensor.numel};
    BucketInMemory y(spec);
    for (int64_t i = 0; i < 7; ++i) y.set_gradient(y.segments[5].offset + i, 0);
    y.set_gradient(y.segments[14].offset + 3, NAN);
    const std::vector<double> h = shared_values(y);
    const Scalar scalar(y.b);
    kernels.blend(y.b);
    for (int64_t index = 0; index < y.b.num_segments; ++index) {
      const Segment& s = y.segments[index];
      if (s.numel > 0) {
        EXPECT_EQ(y.b.outcome[index], dense_outcome(y.b, index));
      }
      for (int64_t i = s.offset; i < s.offset + s.numel; ++i) {
        const double keep = scalar.w(1 - y.b.eta), eta = scalar.w(y.b.eta);
        const double blended =
            scalar.s(scalar.w(scalar.w(keep * h[i]) + scalar.w(eta * y.gradient(i))));
        ASSERT_EQ(y.shared(i), dense_outcome(y.b, index) == Outcome::kNormal ? blended : h[i]);
      }
    }
    check_published(kernels, y);
  });
}

// --- threads
// ----------------------------------------------------------------------------------------

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
}  // namespace arc_topk
