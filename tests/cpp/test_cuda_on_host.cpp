// The CUDA kernels' bodies, run on the host, against the CPU's kernels: the same bits where each
// element is worked on alone, rounding apart where sums are made in another order.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>

#include "bucket_in_memory.h"
#include "cuda_on_host.h"
#include "exchange/plan.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::BucketInMemory;
using ::arc_topk::testing::BucketSpec;
using ::arc_topk::testing::CudaOnHost;
using ::arc_topk::testing::Tensor;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16, kF16 = DType::kF16;
constexpr FeedbackKind kAllFeedback[] = {FeedbackKind::kNone, FeedbackKind::kEF14,
                                         FeedbackKind::kEF21, FeedbackKind::kEF21M};

// A bucket with the pieces and the scratch memory that some kernels want.
class CudaBucket : public BucketInMemory {
 public:
  explicit CudaBucket(const BucketSpec& spec, const Kernels& kernels = CudaOnHost())
      : BucketInMemory(spec) {
    pieces = cut_into_pieces(segments, kernels.grain());
    b.pieces = pieces.data();
    b.num_pieces = static_cast<int64_t>(pieces.size());
    b.splits_rows = splits_rows(pieces, segments);
    scratch_.resize(static_cast<size_t>(kernels.scratch_bytes(b)) / 8 + 1);
    b.scratch = scratch_.data();
  }

  // h, whatever stands in its place.
  double estimate(int64_t i) const {
    for (int64_t k = 0; k < b.num_segments; ++k) {
      if (b.is_withheld[k] != 0 && segments[k].offset == i)
        return testing::get(b.state_type, b.withheld, k);
    }
    return shared(i);
  }

 private:
  std::vector<uint64_t> scratch_;
};

std::vector<Tensor> shapes() {
  return {
      {0, 1, 0},
      {48 * 24, 24, 7},       // rows of a part of a warp, at aligned places
      {7},                    // dense
      {31 * 17, 17, 31},      // all rows kept, odd places from here on
      {100 * 33 - 5, 33, 9},  // a short last row
      {1, 1, 1},
      {12 * 300, 300, 5},
      {9, 1, 0, false},           // dense in the second payload
      {5 * 2050, 2050, 2},        // rows of the whole block
      {2 * 20000 - 3, 20000, 1},  // rows of several pieces
      {40 * 8, 8, 3},
      {64, 64, 1},  // one row
      {77, 1, 20},  // one column
  };
}

std::string describe(const BucketSpec& s) {
  const auto name = [](DType type) {
    return type == kF32 ? "f32" : type == kF64 ? "f64" : type == kBF16 ? "bf16" : "f16";
  };
  return "feedback " + std::to_string(static_cast<int>(s.feedback)) + ", gradient " +
         name(s.gradient) + ", state " + name(s.state) + ", wire " + name(s.wire) + ", r " +
         std::to_string(s.sketch_dim);
}

std::vector<BucketSpec> specs() {
  struct Types {
    DType gradient, state, wire;
    double scale;
  };
  const Types types[] = {{kF32, kF32, kF32, 1},   {kF64, kF64, kF64, 1},   {kBF16, kF32, kBF16, 1},
                         {kF16, kF32, kF16, .25}, {kF32, kBF16, kBF16, 1}, {kBF16, kBF16, kF32, 1}};
  std::vector<BucketSpec> all;
  for (FeedbackKind feedback : kAllFeedback) {
    int64_t dims[] = {4, 1, 3, 7, 4, 8};
    for (size_t i = 0; i < std::size(types); ++i) {
      BucketSpec spec;
      spec.tensors = shapes();
      spec.feedback = feedback;
      spec.gradient = types[i].gradient;
      spec.state = types[i].state;
      spec.wire = types[i].wire;
      spec.wire_scale = types[i].scale;
      spec.sketch_dim = dims[i];
      all.push_back(spec);
    }
  }
  return all;
}

// Both backends on buckets of the same contents. The flags are told by themselves here: in
// BucketInMemory they lie apart from the payloads.
struct Pair {
  explicit Pair(const BucketSpec& spec) : host(spec, cpu_kernels()), cuda(spec) {
    host.projection();
    v = cuda.projection();
    host.v = cuda.v;
  }
  Projection host_v() { return {host.v.data(), v.stride}; }

  // Everything that is the bucket's own, bit by bit.
  void expect_same_state(const char* when) {
    SCOPED_TRACE(when);
    for (int64_t i = 0; i < host.b.numel; ++i) {
      ASSERT_EQ(bits(host.own_a(i)), bits(cuda.own_a(i))) << "own_a " << i;
      ASSERT_EQ(bits(host.own_b(i)), bits(cuda.own_b(i))) << "own_b " << i;
      if (host.b.shared) {
        ASSERT_EQ(bits(host.shared(i)), bits(cuda.estimate(i))) << "h " << i;
      }
    }
  }
  void expect_same_marks() {
    for (int64_t i = 0; i < host.b.num_segments; ++i) {
      const bool compressed = host.segments[i].compressed();
      if (compressed) {
        ASSERT_EQ(host.b.used[i], cuda.b.used[i]) << i;
        ASSERT_EQ(host.b.bad[i], cuda.b.bad[i]) << i;
        ASSERT_EQ(host.b.outcome[i], cuda.b.outcome[i]) << i;
      }
    }
  }
  // What DDP is handed. Of a tensor that is not finite all is NaN, or the first element of h.
  void expect_same_result() {
    const bool shared = shares_estimate(host.spec.feedback);
    const bool host_in_gradient = !shared || cpu_kernels().publish(host.b);
    const bool cuda_in_gradient = !shared || kernels.publish(cuda.b);
    for (int64_t k = 0; k < host.b.num_segments; ++k) {
      const Segment& s = host.segments[k];
      const bool finite = host.b.outcome[k] != Outcome::kNonFinite;
      const int64_t count = finite || cuda_in_gradient ? s.numel : std::min<int64_t>(1, s.numel);
      for (int64_t i = s.offset; i < s.offset + count; ++i) {
        const double expected = host_in_gradient ? host.gradient(i) : host.shared(i);
        const double got = cuda_in_gradient ? cuda.gradient(i) : cuda.shared(i);
        ASSERT_EQ(bits(expected), bits(got)) << "result " << i;
      }
    }
  }
  static uint64_t bits(double x) { return std::isnan(x) ? 1 : std::bit_cast<uint64_t>(x); }

  CudaBucket host;
  CudaBucket cuda;
  Projection v;
  CudaOnHost kernels;
};

// Gradients: zero in one tensor, and not finite in another.
void spoil(BucketInMemory& x) {
  const auto fill = [&](int64_t index, double value) {
    const Segment& s = x.segments[index];
    for (int64_t i = 0; i < s.numel; ++i) x.set_gradient(s.offset + i, value);
  };
  fill(1, 0);
  fill(8, 0);
  x.set_gradient(x.segments[4].offset + 50, NAN);
  x.set_gradient(x.segments[9].offset + 19000, -INFINITY);
}

// What the sum over ranks may make of this rank's flags.
void set_flags(const Bucket& b, bool others_use) {
  for (int64_t i = 0; i < b.num_segments; ++i) {
    const Segment& s = b.segments[i];
    if (!s.compressed()) continue;
    double flag = testing::get(b.flag_type, b.flags, s.flag);
    if (others_use && i == 1) flag += 1;  // the other unused one is nobody's
    testing::set(b.flag_type, b.flags, s.flag, flag);
  }
}

void expect_close(double got, double expected, double scale, const std::string& what) {
  if (std::isnan(expected) || std::isinf(expected)) {
    ASSERT_FALSE(std::isfinite(got)) << what;
  } else {
    ASSERT_NEAR(got, expected, 1e-5 * scale + 1e-6) << what;
  }
}

void whole_step(const BucketSpec& spec, Pair& x) {
  const Projection host_v = x.host_v();
  cpu_kernels().prepare(x.host.b, &host_v);
  x.kernels.prepare(x.cuda.b, &x.v);
  x.expect_same_marks();
  x.expect_same_state("prepare");
  for (int64_t i = 0; i < x.host.first_numel; ++i)
    expect_close(x.cuda.first(i), x.host.first(i), 100, "first payload " + std::to_string(i));
  for (const Segment& s : x.host.segments) {
    if (!s.compressed()) continue;
    ASSERT_EQ(testing::get(x.host.b.flag_type, x.host.b.flags, s.flag),
              testing::get(x.host.b.flag_type, x.cuda.b.flags, s.flag));
  }

  // One sketch for both from here on: sums in another order may tell rows apart differently.
  std::memcpy(x.cuda.b.first, x.host.b.first,
              static_cast<size_t>(x.host.first_numel * size_of(work_type(spec.gradient))));
  set_flags(x.host.b, true);
  set_flags(x.cuda.b, true);
  cpu_kernels().select(x.host.b, {Keys::kSketch});
  x.kernels.select(x.cuda.b, {Keys::kSketch});
  x.expect_same_marks();
  EXPECT_NEAR(x.host.energy.total, x.cuda.energy.total, 1e-9 * (1 + x.host.energy.total));
  for (int64_t i = 0; i < x.host.b.num_segments; ++i) {
    const Segment& s = x.host.segments[i];
    if (!s.compressed() || x.host.b.outcome[i] != Outcome::kNormal) continue;
    for (int64_t k = 0; k < s.kept; ++k)
      ASSERT_EQ(x.host.b.picks[s.pick + k], x.cuda.b.picks[s.pick + k]) << i << ", pick " << k;
  }

  cpu_kernels().pack_and_commit(x.host.b);
  x.kernels.pack_and_commit(x.cuda.b);
  x.expect_same_state("pack");
  for (int64_t i = 0; i < x.host.second_numel; ++i)
    ASSERT_EQ(Pair::bits(x.host.second(i)), Pair::bits(x.cuda.second(i))) << "payload " << i;

  cpu_kernels().apply(x.host.b, nullptr);
  x.kernels.apply(x.cuda.b, nullptr);
  x.expect_same_state("apply");
  EXPECT_NEAR(x.host.energy.captured, x.cuda.energy.captured, 1e-9 * (1 + x.host.energy.captured));
  x.expect_same_result();
}

TEST(CudaOnHost, AStepIsTheCpus) {
  for (const BucketSpec& spec : specs()) {
    SCOPED_TRACE(describe(spec));
    Pair x(spec);
    spoil(x.host);
    spoil(x.cuda);
    whole_step(spec, x);
    // What the step before has withheld is there again.
    x.host.refill(5);
    x.cuda.refill(5);
    whole_step(spec, x);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

// Buckets of any shapes: what is covered twice or not at all differs from the CPU's.
TEST(CudaOnHost, AnyLayoutIsTheCpus) {
  std::mt19937 random(11);
  const auto up_to = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  for (int round = 0; round < 60; ++round) {
    BucketSpec spec;
    for (int64_t count = 1 + up_to(12); count > 0; --count) {
      const int64_t cols = 1 + up_to(up_to(4) == 0 ? 12000 : 200);
      const int64_t rows = 1 + up_to(cols > 1000 ? 6 : 90);
      const int64_t numel = rows * cols - (rows > 1 ? up_to(cols) : 0);
      spec.tensors.push_back({numel, cols, 1 + up_to(rows)});
      if (up_to(3) == 0) spec.tensors.push_back({up_to(70), 1, 0, up_to(2) == 0});
    }
    spec.feedback = kAllFeedback[up_to(4)];
    spec.gradient = up_to(2) == 0 ? kF32 : kBF16;
    spec.sketch_dim = 1 + up_to(9);
    SCOPED_TRACE("round " + std::to_string(round) + ", " + describe(spec));
    Pair x(spec);
    whole_step(spec, x);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(CudaOnHost, ABucketOfOneLargeAndManySmallMatrices) {
  BucketSpec spec;
  spec.tensors = {{5000 * 64, 64, 500}};
  for (int i = 0; i < 40; ++i) spec.tensors.push_back({64 * 64, 64, 7});
  for (int i = 0; i < 10; ++i) spec.tensors.push_back({64});  // whole_step() spoils some by index
  spec.feedback = FeedbackKind::kEF21M;
  Pair x(spec);
  const Projection host_v = x.host_v();
  cpu_kernels().prepare(x.host.b, &host_v);
  x.kernels.prepare(x.cuda.b, &x.v);
  x.expect_same_state("prepare");
  for (const Piece& p : x.cuda.pieces) EXPECT_LE((p.row_end - p.row_begin) * 64, 8192);
}

TEST(CudaOnHost, RandKIsTheCpus) {
  for (BucketSpec spec : specs()) {
    SCOPED_TRACE(describe(spec));
    for (Tensor& tensor : spec.tensors) tensor.dense_in_first = false;
    spec.sketch_dim = 0;
    Pair x(spec);
    spoil(x.host);
    spoil(x.cuda);
    const auto step = [](const Kernels& kernels, CudaBucket& bucket) {
      kernels.prepare(bucket.b, nullptr);
      kernels.select(bucket.b, {Keys::kRandom, 0x123456789, 5});
      kernels.pack(bucket.b);
      set_flags(bucket.b, true);
      kernels.commit(bucket.b, nullptr);
      kernels.apply(bucket.b, nullptr);
    };
    step(cpu_kernels(), x.host);
    step(x.kernels, x.cuda);
    x.expect_same_marks();
    x.expect_same_state("step");
    x.expect_same_result();
    for (int64_t i = 0; i < x.host.second_numel; ++i)
      ASSERT_EQ(Pair::bits(x.host.second(i)), Pair::bits(x.cuda.second(i))) << "payload " << i;
    if (::testing::Test::HasFatalFailure()) return;
  }
}

// Top-K's selection, by one block and by many, with ties.
TEST(CudaOnHost, MagnitudesAreSelectedAsTheCpuDoes) {
  for (DType type : {kF32, kF64}) {
    for (FeedbackKind feedback : {FeedbackKind::kNone, FeedbackKind::kEF14}) {
      BucketSpec spec;
      spec.gradient = spec.state = spec.wire = type;
      spec.feedback = feedback;
      spec.sketch_dim = 0;
      spec.tensors = {{70001, 1, 7001}, {500, 1, 50}, {90000, 1, 90000}, {66000, 1, 1}};
      Pair x(spec);
      for (CudaBucket* bucket : {&x.host, &x.cuda}) {
        for (int64_t i = 0; i < bucket->b.numel; i += 2) {
          bucket->set_gradient(i, std::round(4 * bucket->gradient(i)) / 4);
          if (bucket->b.own_a) testing::set(type, bucket->b.own_a, i, 0);
        }
      }
      for (int round = 0; round < 2; ++round) {  // what the first leaves in the scratch memory
        cpu_kernels().prepare(x.host.b, nullptr);
        x.kernels.prepare(x.cuda.b, nullptr);
        cpu_kernels().select(x.host.b, {Keys::kMagnitude});
        x.kernels.select(x.cuda.b, {Keys::kMagnitude});
        for (int64_t i = 0; i < x.host.b.num_segments; ++i) {
          const Segment& s = x.host.segments[i];
          for (int64_t k = 0; k < s.kept; ++k)
            ASSERT_EQ(x.host.b.picks[s.pick + k], x.cuda.b.picks[s.pick + k]) << i << ", " << k;
        }
      }
    }
  }
}

TEST(CudaOnHost, GatheredMessagesAreAveragedAsByTheCpu) {
  for (BucketSpec spec : specs()) {
    SCOPED_TRACE(describe(spec));
    for (Tensor& tensor : spec.tensors) {
      const int64_t kept = tensor.kept == 0 ? 0 : std::max<int64_t>(1, tensor.numel / 10);
      tensor = {tensor.numel, 1, kept, tensor.dense_in_first};
    }
    spec.sketch_dim = 0;
    Pair x(spec);
    const DType work = work_type(spec.gradient);
    int64_t picks = 0, flags = 0;
    for (const Segment& s : x.host.segments) picks += s.kept, flags += s.compressed();
    const int64_t first = x.host.first_numel * size_of(work);
    const int64_t second = x.host.second_numel * size_of(spec.wire);
    // As csrc/compress/top_k.cpp lays it out, flags in float32.
    const bool early = size_of(spec.wire) == 8;
    const int64_t bytes = first + second + 4 * picks + 4 * flags;
    std::vector<double> own(static_cast<size_t>(bytes / 8 + 1));
    const auto place = [&](CudaBucket& bucket, char* at) {
      bucket.b.first = at;
      at += first;
      if (early) bucket.b.second = std::exchange(at, at + second);
      bucket.b.picks = reinterpret_cast<int32_t*>(std::exchange(at, at + 4 * picks));
      bucket.b.flags = std::exchange(at, at + 4 * flags);
      if (!early) bucket.b.second = at;
      bucket.b.flag_type = kF32;
    };
    std::vector<double> gathered(static_cast<size_t>(3 * bytes / 8 + 1));
    spoil(x.host);
    spoil(x.cuda);
    std::mt19937 random(3);
    for (int rank = 0; rank < 3; ++rank) {  // three ranks that each picked for itself
      CudaBucket theirs(spec);
      spoil(theirs);
      place(theirs, reinterpret_cast<char*>(own.data()));
      for (int64_t i = 0; i < theirs.first_numel; ++i) testing::set(work, theirs.b.first, i, 0.5);
      for (int64_t i = 0; i < theirs.second_numel; ++i)
        testing::set(spec.wire, theirs.b.second, i, static_cast<double>((i + rank) % 13) - 6);
      for (int32_t shuffles = 0; shuffles <= rank; ++shuffles) theirs.pick_at_random();
      for (const Segment& s : theirs.segments)
        if (s.compressed()) testing::set(kF32, theirs.b.flags, s.flag, rank == 1);
      std::memcpy(reinterpret_cast<char*>(gathered.data()) + rank * bytes, own.data(),
                  static_cast<size_t>(bytes));
    }
    const Gathered message{own.data(), gathered.data(), bytes};
    const auto step = [&](const Kernels& kernels, CudaBucket& bucket) {
      place(bucket, reinterpret_cast<char*>(own.data()));
      kernels.prepare(bucket.b, nullptr);
      kernels.commit(bucket.b, &message);
      kernels.apply(bucket.b, &message);
    };
    // Own picks and values are the last rank's.
    step(cpu_kernels(), x.host);
    step(x.kernels, x.cuda);
    x.expect_same_marks();
    x.expect_same_state("step");
    x.expect_same_result();
    EXPECT_NEAR(x.host.energy.captured, x.cuda.energy.captured,
                1e-9 * (1 + x.host.energy.captured));
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(CudaOnHost, DenseStepsAreTheCpus) {
  for (const BucketSpec& spec : specs()) {
    SCOPED_TRACE(describe(spec));
    Pair x(spec);
    cpu_kernels().divide(x.host.b);
    x.kernels.divide(x.cuda.b);
    for (int64_t i = 0; i < x.host.b.numel; ++i) ASSERT_EQ(x.host.gradient(i), x.cuda.gradient(i));
    if (!shares_estimate(spec.feedback)) continue;
    cpu_kernels().remember(x.host.b);
    x.kernels.remember(x.cuda.b);
    for (int round = 0; round < 3; ++round) {
      if (round == 1) {
        x.host.set_gradient(x.host.b.numel - 1, NAN);
        x.cuda.set_gradient(x.cuda.b.numel - 1, NAN);
      }
      if (round == 2) {
        x.host.set_gradient(x.host.b.numel - 1, 2);
        x.cuda.set_gradient(x.cuda.b.numel - 1, 2);
      }
      ASSERT_EQ(cpu_kernels().adopt(x.host.b), round != 1);
      ASSERT_EQ(x.kernels.adopt(x.cuda.b), round != 1);
      x.expect_same_state("adopt");
    }
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(CudaOnHost, BlendIsTheCpus) {
  for (DType type : {kF32, kBF16}) {
    BucketSpec spec;
    spec.gradient = spec.wire = type;
    spec.feedback = FeedbackKind::kEF21M;
    for (const Tensor& tensor : shapes()) spec.tensors.push_back({tensor.numel});
    Pair x(spec);
    spoil(x.host);
    spoil(x.cuda);
    cpu_kernels().blend(x.host.b);
    x.kernels.blend(x.cuda.b);
    x.expect_same_state("blend");
    x.expect_same_result();
    x.host.refill(5);
    x.cuda.refill(5);
    cpu_kernels().blend(x.host.b);
    x.kernels.blend(x.cuda.b);
    x.expect_same_state("blend after what was not finite");
    x.expect_same_result();
  }
}

TEST(CudaOnHost, ProjectIsTheCpus) {
  BucketSpec spec;
  spec.tensors = {{64, 64, 1}};
  for (int64_t dim : {1, 4, 6}) {
    spec.sketch_dim = dim;
    Pair x(spec);
    std::vector<float> a(static_cast<size_t>(dim) * 3000, -1.0f), c = a;
    cpu_kernels().project(x.host.b, a.data(), 3000, 3, 2999, 77, 1ull << 33);
    x.kernels.project(x.cuda.b, c.data(), 3000, 3, 2999, 77, 1ull << 33);
    EXPECT_EQ(a, c);
  }
}

TEST(CudaOnHost, LaunchesDoNotGrowWithTheNumberOfTensors) {
  for (int64_t dense : {0, 5}) {
    std::vector<size_t> launches;
    for (int count : {1, 30, 300}) {
      BucketSpec spec;
      spec.feedback = FeedbackKind::kEF21M;
      for (int i = 0; i < count; ++i) spec.tensors.push_back({16 * 16, 16, 2});
      for (int64_t i = 0; i < dense; ++i) spec.tensors.push_back({16});
      Pair x(spec);
      x.kernels.prepare(x.cuda.b, &x.v);
      x.kernels.select(x.cuda.b, {Keys::kSketch});
      x.kernels.pack_and_commit(x.cuda.b);
      x.kernels.apply(x.cuda.b, nullptr);
      launches.push_back(x.kernels.launcher().launched.size());
    }
    EXPECT_EQ(launches, std::vector<size_t>(3, dense > 0 ? 6 : 5));
  }
}

// Blocks in any order, twice on the same scratch memory: the same bits.
TEST(CudaOnHost, TheOrderOfBlocksDoesNotMatter) {
  BucketSpec spec;
  spec.tensors = shapes();
  spec.feedback = FeedbackKind::kEF21M;
  std::vector<std::vector<unsigned char>> first;
  for (unsigned seed : {1u, 2u, 3u}) {
    CudaBucket x(spec);
    const Projection v = x.projection();
    CudaOnHost kernels;
    kernels.launcher().random.seed(seed);
    for (int step = 0; step < 2; ++step) {
      kernels.prepare(x.b, &v);
      kernels.select(x.b, {Keys::kSketch});
      kernels.pack_and_commit(x.b);
      kernels.apply(x.b, nullptr);
    }
    if (first.empty()) first = x.contents();
    EXPECT_EQ(x.contents(), first) << "seed " << seed;
  }
}

}  // namespace
}  // namespace arc_topk
