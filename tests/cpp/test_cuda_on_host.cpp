// The CUDA kernels against the CPU's: the same bits where each element is worked on alone, rounding
// apart where sums are made in another order.
//
// Each test runs the kernels' bodies on the host, and the kernels themselves on a GPU where
// ARC_TOPK_TEST_DEVICE=cuda asks for it (`make gpu-check` does).
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "bucket_in_memory.h"
#include "cuda_against_cpu.h"
#include "cuda_on_host.h"
#include "kernels_on.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::BucketInMemory;
using ::arc_topk::testing::BucketSpec;
using ::arc_topk::testing::CudaBucket;
using ::arc_topk::testing::describe;
using ::arc_topk::testing::kAllFeedback;
using ::arc_topk::testing::kernels_asked_for;
using ::arc_topk::testing::kernels_on;
using ::arc_topk::testing::Pair;
using ::arc_topk::testing::set_flags;
using ::arc_topk::testing::Tensor;

constexpr DType kF32 = DType::kF32, kF64 = DType::kF64, kBF16 = DType::kBF16, kF16 = DType::kF16;

// --- what runs the kernels -----------------------------------------------------------------------

std::vector<std::string> devices() {
  std::vector<std::string> names = {"host"};
  if (kernels_asked_for() != "host") names.push_back("cuda");
  return names;
}

class CudaKernels : public ::testing::TestWithParam<std::string> {
 protected:
  const Kernels& kernels = kernels_on(GetParam());
};
INSTANTIATE_TEST_SUITE_P(, CudaKernels, ::testing::ValuesIn(devices()),
                         [](const auto& info) { return "on_" + info.param; });

// One line for all that was not done.
TEST(CudaKernelsOnAGpu, AreTestedWhereAskedFor) {
  if (kernels_asked_for() == "host")
    GTEST_SKIP() << "CUDA was not asked for: ARC_TOPK_TEST_DEVICE=cuda does (make gpu-check)";
  kernels_on(kernels_asked_for());
}

// --- buckets -------------------------------------------------------------------------------------

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

std::vector<BucketSpec> specs() {
  struct Types {
    DType gradient, state, wire;
    double scale;
  };
  const Types types[] = {{kF32, kF32, kF32, 1},   {kF64, kF64, kF64, 1},   {kBF16, kF32, kBF16, 1},
                         {kF16, kF32, kF16, .25}, {kF32, kBF16, kBF16, 1}, {kBF16, kBF16, kF32, 1},
                         {kF32, kF32, kF64, 1}};
  std::vector<BucketSpec> all;
  for (FeedbackKind feedback : kAllFeedback) {
    int64_t dims[] = {4, 1, 3, 7, 4, 8, 2};
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
      // Only then h itself may be handed out.
      spec.may_be_unused = false;
      all.push_back(spec);
      if (shares_estimate(feedback)) {
        spec.result_in_gradient = true;
        all.push_back(spec);
      }
      spec.result_in_gradient = false;
      spec.loss_scale = 24;
      all.push_back(spec);
    }
  }
  return all;
}

// f(spec) for all of them up to the first that fails or throws a Difference.
template <class F>
void for_all_specs(const F& f) {
  for (const BucketSpec& spec : specs()) {
    SCOPED_TRACE(describe(spec));
    ASSERT_NO_THROW(f(spec));
    if (::testing::Test::HasFatalFailure()) return;
  }
}

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

// --- steps ---------------------------------------------------------------------------------------

TEST_P(CudaKernels, AStepIsTheCpus) {
  for_all_specs([&](BucketSpec spec) { testing::sketched_steps(spec, kernels, spoil); });
}

// Rows as integers, in units that both read off the same payload.
TEST_P(CudaKernels, AStepOnTheWireOfLevelsIsTheCpus) {
  const DType types[][2] = {{kF32, kF32}, {kF64, kF64}, {kBF16, kF32}, {kF16, kBF16}};
  int dim = 1;
  for (FeedbackKind feedback : kAllFeedback) {
    for (const auto& [gradient, state] : types) {
      for (const int world_size : {1, 3, 32}) {
        BucketSpec spec;
        for (Tensor tensor : shapes()) {
          tensor.dense_in_first = true;
          spec.tensors.push_back(tensor);
        }
        spec.feedback = feedback;
        spec.gradient = gradient;
        spec.state = state;
        spec.wire = DType::kU8;
        spec.world_size = world_size;
        spec.wire_scale = scale_of_sum(world_size);
        spec.sketch_dim = dim = dim % 9 + 1;
        spec.may_be_unused = world_size == 3;
        spec.loss_scale = world_size == 1 ? 24 : 0;
        SCOPED_TRACE(describe(spec));
        ASSERT_NO_THROW(testing::sketched_steps(spec, kernels, spoil));
      }
    }
  }
}

TEST_P(CudaKernels, ABucketOfOneLargeAndManySmallMatrices) {
  BucketSpec spec;
  spec.tensors = {{5000 * 64, 64, 500}};
  for (int i = 0; i < 40; ++i) spec.tensors.push_back({64 * 64, 64, 7});
  for (int i = 0; i < 10; ++i) spec.tensors.push_back({64});  // spoil() changes some by index
  spec.feedback = FeedbackKind::kEF21M;
  Pair x(spec, kernels);
  const Projection host_v = x.host_v();
  cpu_kernels().prepare(x.host.b, &host_v);
  kernels.prepare(x.cuda.b, &x.v);
  x.expect_same_state("prepare");
  for (const Piece& p : x.cuda.pieces) EXPECT_LE((p.row_end - p.row_begin) * 64, 8192);
}

TEST_P(CudaKernels, RandKIsTheCpus) {
  for_all_specs([&](BucketSpec spec) {
    for (Tensor& tensor : spec.tensors) tensor.dense_in_first = false;
    testing::random_step(spec, kernels, spoil);
  });
}

// Top-K's selection, by one block and by many, with ties.
TEST_P(CudaKernels, MagnitudesAreSelectedAsTheCpuDoes) {
  for (DType type : {kF32, kF64}) {
    for (FeedbackKind feedback : {FeedbackKind::kNone, FeedbackKind::kEF14}) {
      BucketSpec spec;
      spec.gradient = spec.state = spec.wire = type;
      spec.feedback = feedback;
      spec.sketch_dim = 0;
      spec.tensors = {{70001, 1, 7001}, {500, 1, 50}, {90000, 1, 90000}, {66000, 1, 1}};
      Pair x(spec, kernels);
      for (CudaBucket* bucket : {&x.host, &x.cuda}) {
        for (int64_t i = 0; i < bucket->b.numel; i += 2) {
          bucket->set_gradient(i, std::round(4 * bucket->gradient(i)) / 4);
          if (bucket->b.own_a) testing::set(type, bucket->b.own_a, i, 0);
        }
      }
      for (int round = 0; round < 2; ++round) {  // what the first leaves in the scratch memory
        cpu_kernels().prepare(x.host.b, nullptr);
        kernels.prepare(x.cuda.b, nullptr);
        cpu_kernels().select(x.host.b, {Keys::kMagnitude});
        kernels.select(x.cuda.b, {Keys::kMagnitude});
        x.expect_same_picks("select");
      }
    }
  }
}

TEST_P(CudaKernels, GatheredMessagesAreAveragedAsByTheCpu) {
  for_all_specs([&](BucketSpec spec) {
    for (Tensor& tensor : spec.tensors) {
      const int64_t kept = tensor.kept == 0 ? 0 : std::max<int64_t>(1, tensor.numel / 10);
      tensor = {tensor.numel, 1, kept, tensor.dense_in_first};
    }
    spec.sketch_dim = 0;
    Pair x(spec, kernels);
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
      if (early) bucket.b.second = std::exchange(at, at + second);
      bucket.b.first = std::exchange(at, at + first);
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
    x.both([&](const Kernels& its, CudaBucket& bucket) {
      // Own picks and values are the last rank's.
      place(bucket, reinterpret_cast<char*>(own.data()));
      its.prepare(bucket.b, nullptr);
      its.commit(bucket.b, &message);
      its.apply(bucket.b, &message);
    });
    x.expect_same_marks("step");
    x.expect_same_state("step");
    x.expect_same_result("step");
    x.expect_close_energy("step");
  });
}

TEST_P(CudaKernels, DenseStepsAreTheCpus) {
  for_all_specs([&](BucketSpec spec) {
    Pair x(spec, kernels);
    cpu_kernels().divide(x.host.b);
    kernels.divide(x.cuda.b);
    for (int64_t i = 0; i < x.host.b.numel; ++i) ASSERT_EQ(x.host.gradient(i), x.cuda.gradient(i));
    if (!shares_estimate(spec.feedback)) return;
    cpu_kernels().remember(x.host.b);
    kernels.remember(x.cuda.b);
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
      ASSERT_EQ(kernels.adopt(x.cuda.b), round != 1);
      x.expect_same_state("adopt");
    }
  });
}

TEST_P(CudaKernels, BlendIsTheCpus) {
  for (DType type : {kF32, kBF16}) {
    BucketSpec spec;
    spec.gradient = spec.wire = type;
    spec.feedback = FeedbackKind::kEF21M;
    for (const Tensor& tensor : shapes()) spec.tensors.push_back({tensor.numel});
    Pair x(spec, kernels);
    spoil(x.host);
    spoil(x.cuda);
    cpu_kernels().blend(x.host.b);
    kernels.blend(x.cuda.b);
    x.expect_same_state("blend");
    x.expect_same_result("blend");
    x.host.refill(5);
    x.cuda.refill(5);
    cpu_kernels().blend(x.host.b);
    kernels.blend(x.cuda.b);
    x.expect_same_state("blend after what was not finite");
    x.expect_same_result("blend after what was not finite");
  }
}

TEST_P(CudaKernels, ProjectIsTheCpus) {
  BucketSpec spec;
  spec.tensors = {{64, 64, 1}};
  for (int64_t dim : {1, 4, 6}) {
    spec.sketch_dim = dim;
    Pair x(spec, kernels);
    std::vector<float> a(static_cast<size_t>(dim) * 3000, -1.0f), c = a;
    cpu_kernels().project(x.host.b, a.data(), 3000, 3, 2999, 77, 1ull << 33);
    kernels.project(x.cuda.b, c.data(), 3000, 3, 2999, 77, 1ull << 33);
    // Row 2999 is the rest of a vector, with the number that it has in a longer V.
    cpu_kernels().project(x.host.b, a.data(), 3000, 2999, 3000, 77, 1ull << 33);
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
      CudaBucket x(spec);
      const Projection v = x.projection();
      testing::CudaOnHost kernels;
      kernels.prepare(x.b, &v);
      kernels.select(x.b, {Keys::kSketch});
      kernels.pack_and_commit(x.b);
      kernels.apply(x.b, nullptr);
      launches.push_back(kernels.launcher().launched.size());
    }
    EXPECT_EQ(launches, std::vector<size_t>(3, dense > 0 ? 6 : 5));
  }
}

// Blocks in any order (on the host another one with every launch), twice on the same scratch
// memory: the same bits.
TEST_P(CudaKernels, TheOrderOfBlocksDoesNotMatter) {
  BucketSpec spec;
  spec.tensors = shapes();
  spec.feedback = FeedbackKind::kEF21M;
  std::vector<std::vector<unsigned char>> first;
  for (int round = 0; round < 3; ++round) {
    CudaBucket x(spec);
    const Projection v = x.projection();
    for (int step = 0; step < 2; ++step) {
      kernels.prepare(x.b, &v);
      kernels.select(x.b, {Keys::kSketch});
      kernels.pack_and_commit(x.b);
      kernels.apply(x.b, nullptr);
    }
    if (first.empty()) first = x.contents();
    EXPECT_EQ(x.contents(), first) << "round " << round;
  }
}

}  // namespace
}  // namespace arc_topk
