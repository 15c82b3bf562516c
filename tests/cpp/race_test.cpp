// The CUDA kernels have no races, read nothing that nobody wrote, and need each of their barriers.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "bucket_in_memory.h"
#include "kernels/directions.h"
#include "kernels/low_rank.h"
#include "plan/plan.h"
#include "race_bodies.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::BucketInMemory;
using ::arc_topk::testing::BucketSpec;
using ::arc_topk::testing::HostLauncher;
using ::arc_topk::testing::Tensor;
namespace race = ::arc_topk::testing::race;

// --- the detector itself
// ---------------------------------------------------------------------------

// Two blocks of one warp on an array of a few numbers. f(block, t, shared) is a phase's text.
struct Memory {
  uint32_t* counter;
  uint32_t* numbers;
};
struct Numbers {
  uint32_t number[64];
  bool last;
};

template <class F>
struct Body {
  static constexpr int kThreads = cuda::kWarp;
  using Shared = Numbers;
  Memory memory;
  F f;

  template <class Block>
  void operator()(Block& block, Shared& shared) const {
    f(block, shared, memory);
  }
};

// The reports about a body of that text.
template <class F>
std::vector<std::string> reports_of(const F& f, int64_t blocks = 1, bool written = true) {
  race::reset();
  const Memory memory{static_cast<uint32_t*>(race::allocate("counter", 4)),
                      static_cast<uint32_t*>(race::allocate("numbers", 256))};
  race::set_written(memory.counter, 4);
  race::set_written(memory.numbers, 256, written);
  HostLauncher<race::Watch>().launch(Bucket{}, "body", Body<F>{memory, f}, blocks);
  return race::reports();
}

void expect_one(const std::vector<std::string>& reports, const std::string& part) {
  ASSERT_EQ(reports.size(), 1) << ::testing::PrintToString(reports);
  EXPECT_NE(reports[0].find(part), std::string::npos) << reports[0];
}

TEST(RaceChecker, ThreadsOfABlockMayNotMeetWithinAPhase) {
  const auto one_writes = [](auto& block, Numbers& shared, Memory) {
    block.each([&](int t) {
      if (t == 3) shared.number[0] = 1;
    });
    block.each([&](int t) {
      if (t == 5) shared.number[1] = shared.number[0];
    });
  };
  expect_one(reports_of(one_writes), "written by thread 3 of the same block with nothing between");
  const auto same_value = [](auto& block, Numbers&, Memory memory) {
    block.each([&](int) { memory.numbers[7] = 1; });
  };
  expect_one(reports_of(same_value), "byte 28 of numbers (256) is written by thread");
  const auto one_reads = [](auto& block, Numbers&, Memory memory) {
    typename std::decay_t<decltype(block)>::template Each<uint32_t> x;
    block.each([&](int t) { x[t] = memory.numbers[0]; });
    block.each([&](int t) {
      if (t == 3) memory.numbers[0] = x[t];
    });
  };
  expect_one(reports_of(one_reads), "is written by thread 3, read by several threads");
}

TEST(RaceChecker, WhatIsToldOutsideOfAPhaseAllThreadsDo) {
  const auto all_write = [](auto&, Numbers& shared, Memory) { shared.number[0] = 1; };
  expect_one(reports_of(all_write), "is written by all threads");
  const auto all_read = [](auto& block, Numbers& shared, Memory memory) {
    block.each([&](int t) {
      if (t == 0) shared.number[0] = 1;
    });
    const uint32_t x = shared.number[0];
    block.sync();
    block.each([&](int t) { memory.numbers[t] = x; });
  };
  expect_one(reports_of(all_read), "is read by all threads, written by thread 0");
}

TEST(RaceChecker, ABarrierIsEnoughAndNeeded) {
  const auto reverses = [](auto& block, Numbers& shared, Memory memory) {
    block.each([&](int t) { shared.number[t] = memory.numbers[t]; });
    block.sync();
    block.each([&](int t) { memory.numbers[t] = shared.number[31 - t]; });
  };
  EXPECT_EQ(reports_of(reverses), std::vector<std::string>());
  ASSERT_EQ(race::sites().size(), 1);
  const race::Site site = race::sites().begin()->first;
  EXPECT_EQ(race::sites().at(site), 1);
  const auto left_out = [&](auto& block, Numbers& shared, Memory memory) {
    race::skip(site);
    reverses(block, shared, memory);
  };
  expect_one(reports_of(left_out), "of the same block with nothing between");
}

TEST(RaceChecker, MarksMayMeetAndAdditionsToo) {
  const auto marks = [](auto& block, Numbers& shared, Memory memory) {
    block.each([&](int t) {
      block.mark(memory.numbers + 1, 1u);
      block.add(memory.numbers + 2, 1u);
      shared.number[t] = block.fresh(memory.numbers + 1);
    });
  };
  EXPECT_EQ(reports_of(marks, 3), std::vector<std::string>());
  const auto incomplete = [](auto& block, Numbers& shared, Memory memory) {
    block.each([&](int t) {
      block.add(memory.numbers + 2, 1u);
      shared.number[t] = block.fresh(memory.numbers + 2);
    });
  };
  EXPECT_FALSE(reports_of(incomplete).empty());
  const auto plain = [](auto& block, Numbers&, Memory memory) {
    block.each([&](int t) {
      block.mark(memory.numbers + 1, 1u);
      if (t == 4) memory.numbers[1] = 1;
    });
  };
  EXPECT_FALSE(reports_of(plain).empty());
}

// Blocks write a number each; the last reads them all.
struct LastReads {
  bool fences_before = true;
  bool fences_after = true;
  bool waits_before = true;
  bool waits_after = true;

  template <class Block>
  void operator()(Block& block, Numbers& shared, Memory memory) const {
    block.each([&](int t) {
      if (t == 9) memory.numbers[block.index()] = 1;
    });
    if (waits_before) block.sync();
    block.each([&](int t) {
      if (t != 0) return;
      if (fences_before) block.fence();
      shared.last = block.add(memory.counter, 1u) + 1 == block.blocks();
      if (fences_after) block.fence();
    });
    block.sync();
    if (!shared.last) return;
    block.each([&](int t) {
      if (t >= block.blocks()) return;
      shared.number[t] = waits_after ? memory.numbers[t] : 0;
    });
  }
};

TEST(RaceChecker, BlocksMeetOnlyBehindAFenceAndACounter) {
  EXPECT_EQ(reports_of(LastReads{}, 5), std::vector<std::string>());
  const std::string expected = "written by thread 9 of another block with nothing between";
  expect_one(reports_of(LastReads{.fences_before = false}, 5), expected);
  expect_one(reports_of(LastReads{.fences_after = false}, 5), expected);
  expect_one(reports_of(LastReads{.waits_before = false}, 5), expected);
  const auto plain = [](auto& block, Numbers&, Memory memory) {
    block.each([&](int t) {
      if (t == 0) memory.numbers[0] = 1;
    });
  };
  expect_one(reports_of(plain, 2), "of another block with nothing between");
}

TEST(RaceChecker, AReadOfWhatNobodyWroteAndATouchOfNoArray) {
  const auto reads = [](auto& block, Numbers& shared, Memory memory) {
    block.each([&](int t) { shared.number[t] = memory.numbers[t]; });
  };
  expect_one(reports_of(reads, 1, false), "of numbers (256) is read, never written");
  const auto reads_shared = [](auto& block, Numbers& shared, Memory memory) {
    block.each([&](int t) { memory.numbers[t] = shared.number[t]; });
  };
  // Another block's is not this one's.
  expect_one(reports_of(reads_shared, 1), "of shared memory is read, never written");
  const auto beyond = [](auto& block, Numbers&, Memory memory) {
    block.each([&](int t) { memory.numbers[40 + t] = 0; });
  };
  expect_one(reports_of(beyond), "of numbers (256) may not be touched");
  const auto copies = [](auto& block, Numbers& shared, Memory memory) {
    block.each([&](int t) {
      if (t == 0) std::memcpy(shared.number, memory.numbers, 128);
    });
  };
  expect_one(reports_of(copies, 1, false), "of numbers (256) is read, never written");
}

// --- buckets in the device's memory
// ------------------------------------------------------------------

// As the engine has them before the first step: state zero or filled, payloads never written.
class DeviceBucket {
 public:
  DeviceBucket(const BucketSpec& spec, const Kernels& kernels, bool factorises = false)
      : host(spec), pieces_(cut_into_pieces(host.segments, kernels.grain())), b(host.b) {
    directions_ = factorises && spec.wire == DType::kU8;
    for (Segment& s : host.segments) s.flag *= directions_ ? 2 : 1;
    b.segments = put("segments", host.segments.data(), b.num_segments);
    b.pieces = put("pieces", pieces_.data(), static_cast<int64_t>(pieces_.size()));
    b.num_pieces = static_cast<int64_t>(pieces_.size());
    b.splits_rows = splits_rows(pieces_, host.segments);
    for (void** state : {&b.own_a, &b.own_b, &b.shared})
      if (*state != nullptr) *state = put_bytes("state", *state, b.numel * size_of(b.state_type));
    b.gradient = put_bytes("gradient", b.gradient, b.numel * size_of(b.gradient_type));
    int64_t flags = 0, picks = 0;
    for (const Segment& s : host.segments) flags += s.compressed(), picks += s.kept;
    b.first = array("first payload", first_bytes());
    b.second = array("second payload", second_bytes());
    if (!directions_) b.flags = array("flags", flags * size_of(b.flag_type));
    b.picks = static_cast<int32_t*>(array("picks", 4 * picks));
    b.used = static_cast<uint8_t*>(array("used", b.num_segments));
    b.bad = static_cast<uint8_t*>(array("bad", b.num_segments));
    b.outcome = static_cast<Outcome*>(array("outcome", b.num_segments));
    b.withheld = array("withheld", b.num_segments * size_of(b.state_type));
    b.is_withheld = static_cast<uint8_t*>(zeros("is_withheld", b.num_segments));
    b.energy = static_cast<Energy*>(zeros("energy", sizeof(Energy)));
    if (factorises) put_factors(kernels);
    b.scratch = zeros("scratch", kernels.scratch_bytes(b));
    if (b.loss_scale == nullptr) return;
    b.loss_scale = put("loss scale", b.loss_scale, 2);
    b.scale_before = put("scale before", b.scale_before, 2);
  }

  int64_t first_bytes() const { return host.first_numel * size_of(work_type(b.gradient_type)); }
  int64_t second_bytes() const { return host.second_numel * size_of(b.wire_type); }

  // Another gradient, the same as the host's.
  void refill(unsigned seed) {
    host.refill(seed);
    copy_gradient();
  }
  void copy_gradient() {
    std::memcpy(b.gradient, host.b.gradient,
                static_cast<size_t>(b.numel * size_of(b.gradient_type)));
  }

  // What the sum over ranks makes of the flags: another rank has used every tensor of an odd
  // number.
  void sum_flags() {
    for (int64_t i = 1; i < b.num_segments; i += 2) {
      const Segment& s = b.segments[i];
      if (s.compressed())
        testing::set(b.flag_type, b.flags, s.flag, testing::get(b.flag_type, b.flags, s.flag) + 1);
    }
  }

  static void* array(const std::string& name, int64_t bytes) {
    return race::allocate(name, static_cast<size_t>(bytes));
  }
  static void* zeros(const std::string& name, int64_t bytes) {
    void* at = array(name, bytes);
    race::set_written(at, static_cast<size_t>(bytes));
    return at;
  }

  BucketInMemory host;

 private:
  static void* put_bytes(const std::string& name, const void* from, int64_t bytes) {
    void* at = zeros(name, bytes);
    if (bytes > 0) std::memcpy(at, from, static_cast<size_t>(bytes));
    return at;
  }
  template <class T>
  static T* put(const std::string& name, const T* from, int64_t count) {
    return static_cast<T*>(put_bytes(name, from, count * static_cast<int64_t>(sizeof(T))));
  }

  // As bucket_state.cpp has them, all of them zero.
  void put_factors(const Kernels& kernels) {
    int64_t left = 0, right = 0, partial = 0, bytes = 0;
    for (const Segment& s : host.segments) bytes += s.compressed() ? 2 : 0;  // flags
    Factors& f = b.factors;
    for (const Segment& s : host.segments) {
      places_.push_back({left, right, partial, bytes});
      if (!s.compressed()) continue;
      bytes += s.kept * (direction_rows(s.rows) + kNormBytes * b.world_size);
      const int64_t its = s.kept * factor_stride(s.cols);
      left += s.rows * s.kept;
      right += its;
      partial +=
          std::max((s.rows + kStripRows - 1) / kStripRows * its,
                   ((s.cols + kWindowCols - 1) / kWindowCols * s.rows * s.kept + 15) / 16 * 16);
      f.most_columns = std::max(f.most_columns, s.kept);
    }
    const int64_t size = size_of(work_type(b.gradient_type));
    tiles_ = cut_into_tiles(host.segments, kernels.grain());
    f.left = zeros("left factors", left * size);
    if (b.own_a != nullptr) f.right = zeros("right factors", right * size);
    f.basis = static_cast<float*>(zeros("basis", right * 4));
    f.partial = zeros("partial sums", partial * size);
    f.places = put("places", places_.data(), b.num_segments);
    f.num_tiles = static_cast<int64_t>(tiles_.size());
    f.tiles = put("tiles", tiles_.data(), f.num_tiles);
    f.left_numel = left;
    b.sketch_dim = 0;
    if (!directions_) return;
    num_directions = bytes;
    b.directions = static_cast<uint8_t*>(array("directions", bytes));
    b.flags = b.directions;
    b.flag_type = DType::kU8;
  }

  std::vector<Piece> pieces_;
  std::vector<Piece> tiles_;
  std::vector<FactorPlace> places_;
  bool directions_ = false;

 public:
  int64_t num_directions = 0;
  Bucket b;
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
      {9, 1, 0, false},         // dense in the second payload
      {5 * 2050, 2050, 2},      // rows of the whole block
      {5 * 8201 - 3, 8201, 2},  // rows of several pieces; V's last rows from every place
      {8200 * 2, 2, 100},       // more rows than the selection keeps in shared memory
      {10000},                  // dense, in several pieces
      {77, 1, 20},              // one column
  };
}

// Gradients: zero in one tensor that other ranks have used and in one that they have not, and not
// finite in two.
void spoil(DeviceBucket& x) {
  const auto fill = [&](size_t index, double value) {
    const Segment& s = x.host.segments[index];
    for (int64_t i = 0; i < s.numel; ++i) x.host.set_gradient(s.offset + i, value);
  };
  fill(1, 0);
  fill(8, 0);
  for (int64_t i : {50, 1500, 3000}) x.host.set_gradient(x.host.segments[4].offset + i, NAN);
  x.host.set_gradient(x.host.segments[9].offset + 8200, -INFINITY);
  x.copy_gradient();
}

// --- scenarios -----------------------------------------------------------------------------------

void sketched_steps(const BucketSpec& spec, const race::WatchedKernels& kernels) {
  DeviceBucket x(spec, kernels);
  int64_t cols = 1;
  for (const Tensor& tensor : spec.tensors)
    if (tensor.kept > 0) cols = std::max(cols, tensor.cols);
  const int64_t stride = (cols + 15) / 16 * 16;
  auto* v = static_cast<float*>(DeviceBucket::array("V", 4 * stride * spec.sketch_dim));
  kernels.project(x.b, v, stride, 0, cols, 7, 1);
  const Projection projection{v, stride};
  spoil(x);
  for (unsigned step = 0; step < 2; ++step) {
    if (step > 0 && spec.feedback == FeedbackKind::kEF14) kernels.reclaim(x.b);
    kernels.prepare(x.b, &projection);
    race::expect_written(x.b.first, static_cast<size_t>(x.first_bytes()));
    x.sum_flags();
    kernels.select(x.b, {Keys::kSketch});
    kernels.pack_and_commit(x.b);
    race::expect_written(x.b.second, static_cast<size_t>(x.second_bytes()));
    kernels.apply(x.b, nullptr);
    x.refill(step);
  }
}

void random_step(BucketSpec spec, const race::WatchedKernels& kernels) {
  spec.sketch_dim = 0;
  for (Tensor& tensor : spec.tensors) tensor.dense_in_first = false;
  DeviceBucket x(spec, kernels);
  spoil(x);
  kernels.prepare(x.b, nullptr);
  kernels.select(x.b, {Keys::kRandom, 0x123456789, 5});
  kernels.pack(x.b);
  race::expect_written(x.b.second, static_cast<size_t>(x.second_bytes()));
  x.sum_flags();
  kernels.commit(x.b, nullptr);
  kernels.apply(x.b, nullptr);
}

// As csrc/compress/top_k.cpp lays its message out, flags in float32.
void gathered_step(BucketSpec spec, const race::WatchedKernels& kernels) {
  for (Tensor& tensor : spec.tensors) {
    const int64_t kept = tensor.kept == 0 ? 0 : std::max<int64_t>(1, tensor.numel / 10);
    tensor = {tensor.numel, 1, kept, tensor.dense_in_first};
  }
  spec.tensors.push_back({kManyRows + 5000, 1, 7001});
  spec.sketch_dim = 0;
  DeviceBucket x(spec, kernels);
  int64_t picks = 0, flags = 0;
  for (const Segment& s : x.host.segments) picks += s.kept, flags += s.compressed();
  const int64_t bytes = x.first_bytes() + 4 * picks + 4 * flags + x.second_bytes();
  auto* own = static_cast<char*>(DeviceBucket::array("message", bytes));
  char* at = own;
  const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
  if (size_of(spec.wire) == 8) x.b.second = take(x.second_bytes());
  x.b.first = take(x.first_bytes());
  x.b.picks = reinterpret_cast<int32_t*>(take(4 * picks));
  x.b.flags = take(4 * flags);
  x.b.flag_type = DType::kF32;
  if (size_of(spec.wire) != 8) x.b.second = take(x.second_bytes());
  spoil(x);
  // The selection leaves the picks of a tensor that is not normal as they are, from the step
  // before.
  std::memset(x.b.picks, 0, static_cast<size_t>(4 * picks));
  kernels.prepare(x.b, nullptr);
  kernels.select(x.b, {Keys::kMagnitude});
  kernels.pack(x.b);
  race::expect_written(own, static_cast<size_t>(bytes));
  auto* all = static_cast<char*>(DeviceBucket::zeros("messages", spec.world_size * bytes));
  for (int rank = 0; rank < spec.world_size; ++rank) {
    char* message = all + rank * bytes;
    std::memcpy(message, own, static_cast<size_t>(bytes));
    if (rank == 0) continue;
    x.host.pick_at_random();
    std::memcpy(message + (reinterpret_cast<char*>(x.b.picks) - own), x.host.b.picks,
                static_cast<size_t>(4 * picks));
    for (const Segment& s : x.host.segments)
      if (s.compressed())
        testing::set(DType::kF32, message + (static_cast<char*>(x.b.flags) - own), s.flag,
                     rank == 1);
  }
  const Gathered messages{own, all, bytes};
  kernels.commit(x.b, &messages);
  kernels.apply(x.b, &messages);
}

void low_rank_steps(BucketSpec spec, const race::WatchedKernels& kernels) {
  constexpr int64_t kMost = 17;
  spec.sketch_dim = kMost;  // room for P in the first payload
  for (Tensor& tensor : spec.tensors) {
    const int64_t rows = (tensor.numel + tensor.cols - 1) / tensor.cols;
    tensor.kept = std::min({tensor.kept, rows, tensor.cols, kMost});
  }
  DeviceBucket x(spec, kernels, /*factorises=*/true);
  const LowRankKernels& low_rank = *kernels.low_rank();
  spoil(x);
  for (unsigned step = 0; step < 3; ++step) {
    if (step > 0 && spec.feedback == FeedbackKind::kEF14) low_rank.reclaim(x.b);
    low_rank.prepare(x.b, 11, step);
    const int64_t size = size_of(work_type(spec.gradient));
    for (const Segment& s : x.host.segments) {
      if (s.compressed())
        race::expect_written(static_cast<char*>(x.b.first) + s.sketch * size,
                             static_cast<size_t>(s.rows * s.kept * size));
    }
    if (x.b.directions != nullptr)
      race::expect_written(x.b.directions, static_cast<size_t>(x.num_directions));
    x.sum_flags();
    low_rank.orthonormalise(x.b);
    low_rank.multiply_back(x.b);
    race::expect_written(x.b.second, static_cast<size_t>(x.second_bytes()));
    low_rank.apply(x.b);
    if (step == 1) low_rank.settle(x.b);
    x.refill(step);
  }
}

void dense_steps(const BucketSpec& spec, const race::WatchedKernels& kernels) {
  DeviceBucket x(spec, kernels);
  kernels.divide(x.b);
  if (!shares_estimate(spec.feedback)) return;
  kernels.remember(x.b);
  spoil(x);
  EXPECT_FALSE(kernels.adopt(x.b));
  x.refill(3);
  EXPECT_TRUE(kernels.adopt(x.b));
}

void blended_steps(BucketSpec spec, const race::WatchedKernels& kernels) {
  for (Tensor& tensor : spec.tensors) tensor = {tensor.numel};
  spec.feedback = FeedbackKind::kEF21M;
  DeviceBucket x(spec, kernels);
  spoil(x);
  kernels.blend(x.b);
  x.refill(3);
  kernels.blend(x.b);
}

BucketSpec with_levels(BucketSpec spec) {
  spec.wire = DType::kU8;
  for (Tensor& tensor : spec.tensors) tensor.dense_in_first = true;
  return spec;
}

using Scenario = std::function<void(const race::WatchedKernels&)>;
struct Named {
  std::string name;
  Scenario run;
};

std::vector<Named> scenarios() {
  constexpr FeedbackKind kAll[] = {FeedbackKind::kEF21M, FeedbackKind::kEF14, FeedbackKind::kEF21,
                                   FeedbackKind::kNone};
  std::vector<Named> all;
  for (FeedbackKind feedback : kAll) {
    for (DType type : {DType::kF32, DType::kBF16}) {
      BucketSpec spec;
      spec.tensors = shapes();
      spec.feedback = feedback;
      spec.gradient = spec.wire = type;
      spec.sketch_dim = type == DType::kF32 ? 4 : 5;
      spec.loss_scale = type == DType::kF32 ? 0 : 8;
      std::string name = std::string(type == DType::kF32 ? "float32" : "bfloat16") + ", feedback " +
                         std::to_string(static_cast<int>(feedback)) + ", ";
      const auto add = [&](const char* what, auto step) {
        all.push_back({name + what, [=](const auto& kernels) { step(spec, kernels); }});
      };
      add("ARC-Top-K", sketched_steps);
      add("Rand-K", random_step);
      add("Top-K", gathered_step);
      add("dense", dense_steps);
      if (!shares_estimate(feedback)) {
        add("low rank", low_rank_steps);
        all.push_back({name + "low rank, levels",
                       [=](const auto& kernels) { low_rank_steps(with_levels(spec), kernels); }});
      }
      all.push_back({name + "ARC-Top-K, levels",
                     [=](const auto& kernels) { sketched_steps(with_levels(spec), kernels); }});
      if (feedback == FeedbackKind::kEF21M) add("blended", blended_steps);
      if (!shares_estimate(feedback)) continue;
      spec.may_be_unused = false;  // only then h itself is handed out
      name += "h handed out, ";
      add("ARC-Top-K", sketched_steps);
      add("Rand-K", random_step);
      add("Top-K", gathered_step);
      add("dense", dense_steps);
    }
  }
  return all;
}

// --- tests ---------------------------------------------------------------------------------------

TEST(Races, NoneAndNothingReadThatNobodyWrote) {
  const race::WatchedKernels kernels;
  race::Counts all;
  for (const Named& scenario : scenarios()) {
    race::reset();
    scenario.run(kernels);
    EXPECT_EQ(race::reports(), std::vector<std::string>()) << scenario.name;
    all.accesses += race::counts().accesses;
    all.phases += race::counts().phases;
    all.blocks += race::counts().blocks;
    all.launches += race::counts().launches;
  }
  const std::vector<std::string>& launched = kernels.launched();
  const std::set<std::string> expected = {"adopt",
                                          "apply",
                                          "apply_gathered",
                                          "clear",
                                          "combine",
                                          "copy_dense",
                                          "count_digit",
                                          "count_taken",
                                          "divide",
                                          "draw",
                                          "find_nonfinite",
                                          "finish_prepare",
                                          "forget",
                                          "mark_dense",
                                          "multiply_back",
                                          "orthonormalise",
                                          "pack",
                                          "prepare",
                                          "prepare_factors",
                                          "project",
                                          "receive",
                                          "reclaim",
                                          "reclaim_factor",
                                          "remember",
                                          "scan",
                                          "select",
                                          "send",
                                          "settle",
                                          "take"};
  EXPECT_EQ(std::set<std::string>(launched.begin(), launched.end()), expected);
  std::printf(
      "races: %llu accesses, %llu phases, %llu blocks, %llu launches\n",
      static_cast<unsigned long long>(all.accesses), static_cast<unsigned long long>(all.phases),
      static_cast<unsigned long long>(all.blocks), static_cast<unsigned long long>(all.launches));
}

// Each barrier and fence that the kernels come to, left out in turn.
TEST(Races, EachBarrierAndFenceIsNeeded) {
  const race::WatchedKernels kernels;
  const std::vector<Named> all = scenarios();
  std::map<race::Site, std::vector<size_t>> sites;
  for (size_t i = 0; i < all.size(); ++i) {
    race::reset();
    all[i].run(kernels);
    for (const auto& [site, times] : race::sites()) sites[site].push_back(i);
  }
  for (const auto& [site, where] : sites) {
    std::string found;
    for (const size_t i : where) {
      race::reset();
      race::skip(site);
      race::stop_at_first(true);
      try {
        all[i].run(kernels);
      } catch (const race::Stopped&) {
      }
      if (race::reports().empty()) continue;
      found = all[i].name + ": " + race::reports().front();
      break;
    }
    EXPECT_FALSE(found.empty()) << site.text() << " is not needed in " << where.size()
                                << " scenarios";
    std::printf("without %s: %s\n", site.text().c_str(), found.c_str());
  }
}

}  // namespace
}  // namespace arc_topk
