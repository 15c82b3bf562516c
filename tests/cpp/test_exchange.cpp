// The engine on ranks that are threads: what it allocates, how it fails, and that ranks agree.
#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>

#include <atomic>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "error_of.h"
#include "exchange/exchange.h"
#include "heap.h"
#include "thread_group.h"

namespace {

std::atomic<int64_t> tensor_allocations{0};
std::atomic<int64_t> fail_at{-1};  // the allocation that fails

class CountingAllocator final : public c10::Allocator {
 public:
  explicit CountingAllocator(c10::Allocator* inner) : inner_(inner) {}
  c10::DataPtr allocate(size_t bytes) override {
    if (tensor_allocations++ == fail_at) throw std::bad_alloc();
    return inner_->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return inner_->raw_deleter(); }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }

 private:
  c10::Allocator* const inner_;
};

}  // namespace

namespace arc_topk {
namespace {

using ::arc_topk::testing::error_of;
using ::arc_topk::testing::heap_allocations;
using ::arc_topk::testing::on_ranks;
using ::arc_topk::testing::ThreadGroup;
using Group = c10::intrusive_ptr<ThreadGroup>;

std::vector<at::Tensor> many_parameters(int count) {
  std::vector<at::Tensor> parameters;
  for (int i = 0; i < count; ++i)
    parameters.push_back(at::empty(i % 3 == 2 ? at::IntArrayRef{48} : at::IntArrayRef{96, 16}));
  return parameters;
}

at::Tensor gradient_of(const std::vector<at::Tensor>& parameters) {
  int64_t numel = 0;
  for (const at::Tensor& parameter : parameters) numel += parameter.numel();
  return at::randn({numel});
}

struct Choice {
  const char* compressor;
  FeedbackKind feedback;
};

std::vector<Choice> all_choices() {
  std::vector<Choice> choices;
  for (const char* compressor : {"arc_topk", "rand_k", "top_k", "dense"}) {
    for (const FeedbackKind feedback :
         {FeedbackKind::kNone, FeedbackKind::kEF14, FeedbackKind::kEF21, FeedbackKind::kEF21M}) {
      choices.push_back({compressor, feedback});
    }
  }
  choices.push_back({"low_rank", FeedbackKind::kNone});
  choices.push_back({"low_rank", FeedbackKind::kEF14});
  return choices;
}

struct Allocations {
  int64_t tensors;
  int64_t heap;
};

// Per step, once the first steps have made plan, arenas and payloads.
void count_allocations() {
  static CountingAllocator counting(c10::GetCPUAllocator());
  c10::SetCPUAllocator(&counting, /*priority=*/100);
}

Allocations allocations_a_step(const Choice& choice, int tensors, bool scaled = false) {
  count_allocations();
  constexpr int kSteps = 20;
  Allocations a_step{};
  on_ranks(1, [&](int, const Group& group) {
    Config config;
    config.compressor = choice.compressor;
    config.feedback = choice.feedback;
    Exchange exchange(config, {group, group});
    const std::vector<at::Tensor> parameters = many_parameters(tensors);
    const at::Tensor buffer = gradient_of(parameters);
    if (scaled) exchange.set_loss_scale(at::full({}, 8.0));
    for (int step = 0; step < 3; ++step) exchange.start(buffer, parameters, 0)->wait();
    const int64_t tensors_before = tensor_allocations;
    const int64_t heap_before = heap_allocations();
    for (int step = 0; step < kSteps; ++step) exchange.start(buffer, parameters, 0)->wait();
    a_step = {(tensor_allocations - tensors_before), (heap_allocations() - heap_before) / kSteps};
  });
  return a_step;
}

TEST(Allocations, AStepTakesNoTensorMemory) {
  for (const Choice& choice : all_choices()) {
    EXPECT_EQ(allocations_a_step(choice, 30).tensors, 0) << choice.compressor;
    EXPECT_EQ(allocations_a_step(choice, 30, /*scaled=*/true).tensors, 0) << choice.compressor;
  }
}

TEST(Allocations, AStepTakesAFutureFromTheHeapAndNothingPerTensor) {
  for (const Choice& choice : all_choices()) {
    const int64_t one = allocations_a_step(choice, 1).heap;
    const int64_t many = allocations_a_step(choice, 300).heap;
    EXPECT_EQ(one, many) << choice.compressor;
    // The future and what it holds; plain averaging: torch's own mul_; Top-K: the two lists that a
    // group without backends, as this one, wants.
    EXPECT_LE(many, 8) << choice.compressor;
  }
}

TEST(Allocations, MemoryThatCannotBeHadForABucketIsAnErrorAndNothingIsTouched) {
  count_allocations();
  for (const Choice& choice : all_choices()) {
    on_ranks(1, [&](int, const Group& group) {
      Config config;
      config.compressor = choice.compressor;
      config.feedback = choice.feedback;
      Exchange exchange(config, {group, group});
      const std::vector<at::Tensor> parameters = many_parameters(2);
      const at::Tensor buffer = gradient_of(parameters);
      const at::Tensor before = buffer.clone();
      int failures = 0;
      for (;; ++failures) {
        fail_at = tensor_allocations + failures;
        const std::string error = error_of([&] { exchange.start(buffer, parameters, 0)->wait(); });
        fail_at = -1;
        if (error.empty()) break;
        ASSERT_NE(error.find("bad_alloc"), std::string::npos) << error;
        if (exchange.failed()) {  // V, once the step had begun: said with its place
          ASSERT_NE(error.find("phase prepare"), std::string::npos) << error;
          exchange.stop();
          exchange.resume({group, group}, 0, /*afresh=*/false);
        }
        ASSERT_TRUE(buffer.equal(before));
        ASSERT_EQ(group->collectives, 0);
        ASSERT_LT(failures, 100);
      }
      EXPECT_GT(failures, choice.compressor == std::string("dense") ? 1 : 3);
      EXPECT_EQ(exchange.metrics().steps, 1U);
    });
  }
}

TEST(Exchange, RanksGetTheSameBits) {
  for (const Choice& choice : all_choices()) {
    constexpr int kRanks = 3;
    std::vector<std::vector<at::Tensor>> outputs(kRanks);
    on_ranks(kRanks, [&](int rank, const Group& group) {
      Config config;
      config.compressor = choice.compressor;
      config.feedback = choice.feedback;
      Exchange exchange(config, {group, group});
      const std::vector<at::Tensor> parameters = many_parameters(5);
      for (int step = 0; step < 4; ++step) {
        const at::Tensor buffer = gradient_of(parameters) + rank;
        outputs[rank].push_back(exchange.run(buffer, parameters).clone());
      }
    });
    for (int rank = 1; rank < kRanks; ++rank) {
      for (size_t step = 0; step < outputs[0].size(); ++step) {
        EXPECT_TRUE(outputs[rank][step].equal(outputs[0][step])) << choice.compressor;
      }
    }
  }
}

TEST(Exchange, AFailureNamesItsPlaceAndLaterBucketsFailAtOnce) {
  on_ranks(1, [&](int, const Group& group) {
    Exchange exchange(Config{}, {group, group});
    const std::vector<at::Tensor> parameters = many_parameters(2);
    const std::vector<at::Tensor> others = many_parameters(1);
    exchange.bind({parameters[0], parameters[1], others[0]}, {"layer.weight", "b", "c"}, false);
    const at::Tensor buffer = gradient_of(parameters);
    exchange.start(buffer, parameters, 7)->wait();

    group->failure = "the cable is cut";
    const std::string first =
        error_of([&] { exchange.start(buffer, parameters, 7)->waitAndThrow(); });
    for (const char* words :
         {"rank 0", "bucket 7", "'layer.weight'", "phase first_collective", "the cable is cut"}) {
      EXPECT_NE(first.find(words), std::string::npos) << first;
    }
    group->failure.clear();
    const int before = group->collectives;
    const std::string second =
        error_of([&] { exchange.start(gradient_of(others), others, 8)->waitAndThrow(); });
    EXPECT_NE(second.find(first), std::string::npos) << second;
    EXPECT_EQ(group->collectives, before);
  });
}

TEST(Exchange, BytesOfTheLinkAreTheRings) {
  on_ranks(4, [&](int, const Group& group) {
    Config config;
    config.ratio = 0.1;
    const std::vector<at::Tensor> parameters = {at::empty({1000, 64})};
    const auto metrics_of = [&](const char* compressor) {
      config.compressor = compressor;
      Exchange exchange(config, {group, group});
      exchange.run(gradient_of(parameters), parameters);
      return exchange.metrics();
    };
    const Metrics reduced = metrics_of("arc_topk");
    EXPECT_DOUBLE_EQ(reduced.link_bytes, 1.5 * static_cast<double>(reduced.wire_bytes));
    const Metrics gathered = metrics_of("top_k");
    EXPECT_DOUBLE_EQ(gathered.link_bytes, 3.0 * static_cast<double>(gathered.wire_bytes));
  });
}

// What is left of h once every gradient is zero and every h_i with it: what h had drifted by.
double drift_after(const Choice& choice, std::optional<int64_t> resync_every, Metrics& metrics) {
  double left = 0;
  on_ranks(3, [&](int rank, const Group& group) {
    Config config;
    config.compressor = choice.compressor;
    config.feedback = choice.feedback;
    config.eta = 1;
    config.ratio = 0.5;
    config.wire_dtype = DType::kBF16;
    config.resync_every = resync_every;
    Exchange exchange(config, {group, group});
    const std::vector<at::Tensor> parameters = {at::empty({64, 16})};
    exchange.bind(parameters, {"weight"}, /*may_be_unused=*/false);
    for (int step = 0; step < 64; ++step) exchange.run(gradient_of(parameters), parameters);
    at::Tensor h;
    for (int step = 0; step < 64; ++step) h = exchange.run(at::zeros({1024}), parameters);
    if (rank != 0) return;
    left = h.abs().max().item<double>();
    metrics = exchange.metrics();
  });
  return left;
}

TEST(Exchange, WhatANarrowWireLetsTheEstimateDriftByIsMended) {
  for (const char* compressor : {"arc_topk", "rand_k"}) {
    for (const FeedbackKind feedback : {FeedbackKind::kEF21, FeedbackKind::kEF21M}) {
      Metrics never, mended;
      EXPECT_GT(drift_after({compressor, feedback}, 0, never), 1e-3);
      EXPECT_LT(drift_after({compressor, feedback}, std::nullopt, mended), 1e-6);
      // Every 32 of 128 steps: the estimate, in float32.
      EXPECT_EQ(mended.collectives, never.collectives + 4);
      EXPECT_EQ(mended.wire_bytes, never.wire_bytes + 4 * 1024 * 4);
    }
  }
}

TEST(Exchange, EnergyCapturedIsTheReducedRowsShare) {
  // One row holds all the energy, and ratio keeps one row: all of it is captured, up to the
  // sketch's estimate of the total.
  on_ranks(2, [&](int, const Group& group) {
    Config config;
    config.feedback = FeedbackKind::kNone;
    config.ratio = 0.01;
    config.sketch_dim = 64;
    Exchange exchange(config, {group, group});
    const std::vector<at::Tensor> parameters = {at::empty({100, 640})};
    at::Tensor buffer = at::zeros({64000});
    buffer.narrow(0, 640 * 37, 640).fill_(1);
    exchange.run(buffer, parameters);
    const Energy energy = exchange.metrics().energy;
    EXPECT_NEAR(energy.captured, 640, 1e-3);
    EXPECT_NEAR(energy.total, 640, 640 * 0.6);  // chi-squared with 64 degrees of freedom
  });
}

}  // namespace
}  // namespace arc_topk
