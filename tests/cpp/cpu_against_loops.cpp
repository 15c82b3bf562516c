#include "cpu_against_loops.h"

namespace arc_topk::testing {

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

BucketSpec by_element(BucketSpec spec) {
  for (Tensor& tensor : spec.tensors) {
    if (tensor.kept > 0) tensor = {tensor.numel, 1, (tensor.numel + 4) / 5};
  }
  return spec;
}

std::string describe(const cpu::Rows& table, const BucketSpec& spec) {
  return std::string(table.isa) + ", " + describe(spec);
}

std::vector<const cpu::Rows*> all_tables() {
  const cpu::Rows* found[cpu::kMaxTables];
  return {found, found + cpu::tables(found)};
}

const cpu::CpuKernels& best() {
  const cpu::Rows* found[cpu::kMaxTables];
  return cpu::kernels_with(*found[cpu::tables(found) - 1]);
}

namespace {

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

}  // namespace

void for_every_table(const BucketSpec& spec, const Check& check) {
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

void for_everything(const Check& check) {
  for (FeedbackKind feedback : kAllFeedback) {
    for (const BucketSpec& spec : specs(feedback)) {
      for_every_table(spec, check);
      if (::testing::Test::HasFailure()) return;
    }
  }
}

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

void mark_some(const BucketInMemory& x) {
  std::fill_n(x.b.bad, x.b.num_segments, uint8_t{0});
  std::fill_n(x.b.outcome, x.b.num_segments, Outcome::kNormal);
  x.b.outcome[4] = Outcome::kUnused;
  x.b.outcome[8] = Outcome::kNonFinite;
  x.b.bad[8] = 1;
  x.b.outcome[11] = Outcome::kNonFinite;
}

Outcome dense_outcome(const Bucket& b, int64_t index) {
  if (index == 5 && b.may_be_unused) return Outcome::kUnused;
  return index == 14 ? Outcome::kNonFinite : Outcome::kNormal;
}

std::vector<double> shared_values(const BucketInMemory& x) {
  std::vector<double> h;
  for (int64_t i = 0; x.b.shared && i < x.b.numel; ++i) h.push_back(x.shared(i));
  return h;
}

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

}  // namespace arc_topk::testing
