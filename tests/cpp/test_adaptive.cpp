// Config::adaptive: what is chosen by which times, when it is chosen again, and that nothing owed
// is lost from one form to another.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "exchange/adaptive.h"
#include "exchange/exchange.h"
#include "gated_group.h"
#include "thread_group.h"

namespace arc_topk {
namespace {

using Forms = std::vector<Form>;
constexpr Form kD = Form::kDense, kH = Form::kHalf, kC = Form::kCompressed;

BucketTimes bucket(double ready, double dense, double half, double compressed, double own = 0) {
  return {ready, {FormTimes{0, dense, 0}, FormTimes{0, half, 0}, FormTimes{own, compressed, 0}}};
}

// --- choosing ---

TEST(Forms, BucketsFollowEachOtherOnTheWireAsTheyBecomeReady) {
  const std::vector<BucketTimes> times{bucket(0, 3, 2, 1), bucket(1, 3, 2, 1), bucket(9, 3, 2, 1)};
  EXPECT_EQ(seconds_of(times, {kD, kD, kD}), 12);
  EXPECT_EQ(seconds_of({times[0], times[1]}, {kD, kH}), 5);
}

TEST(Forms, TheHooksOwnWorkMakesWhatFollowsLateAndTheLastResult) {
  std::vector<BucketTimes> times{bucket(0, 1, 1, 1, /*own=*/2), bucket(5, 1, 1, 1, /*own=*/2)};
  EXPECT_EQ(seconds_of(times, {kC, kC}), 10);
  times[1].forms[2].behind = 4;
  EXPECT_EQ(seconds_of(times, {kC, kC}), 14);
}

Forms chosen(const std::vector<BucketTimes>& times, const Forms& now = {}) {
  const auto choices = choices_of(times);
  return choices[choose(choices, now)].forms;
}

TEST(Forms, WhatBackwardHidesStaysDense) {
  const BucketTimes hidden = bucket(0, 0.5, 0.3, 0.1), last = bucket(1, 0.01, 0.009, 0.008);
  EXPECT_EQ(chosen({hidden, last}), (Forms{kD, kD}));
}

TEST(Forms, ASlowLinkCompresses) {
  EXPECT_EQ(chosen({bucket(0, 10, 5, 1, 0.1), bucket(1, 10, 5, 1, 0.1)}), (Forms{kC, kC}));
}

TEST(Forms, ABucketThatOnlyWaitsForItsTurnIsBetterOffWithOneCollective) {
  EXPECT_EQ(chosen({bucket(0, 10, 5, 1), bucket(0, 0.1, 0.1, 0.5)}), (Forms{kC, kD}));
}

TEST(Forms, WhatIsInUseStaysWhereNothingIsClearlyFaster) {
  const std::vector<BucketTimes> times{bucket(0, 1.0, 0.995, 0.999)};
  EXPECT_EQ(chosen(times), (Forms{kD}));
  EXPECT_EQ(chosen(times, {kC}), (Forms{kC}));
  EXPECT_EQ(chosen({bucket(0, 2, 1, 1.5)}, {kC}), (Forms{kH}));
}

// --- when ---

// One rank and two buckets over a link of so many seconds a dense bucket; compressed ones have a
// tenth of the bytes, and take 0.02 s of the rank's own work.
class Simulated {
 public:
  explicit Simulated(double dense) : dense(dense) {}
  Forms step() {
    Forms forms;
    double end = now_;
    for (size_t i = 0; i < 2; ++i) {
      now_ += 0.05;
      Adaptive::Task task = adaptive.begin(i, number_, now_);
      if (!task.exchange.empty()) {
        agreed.push_back(number_);
        task.exchange[0] = 0.001;
        adaptive.agree(task.exchange);
      }
      forms.push_back(task.form);
      const double share = task.form == kD ? 1 : task.form == kH ? 0.5 : 0.1;
      const double own = task.form == kC ? 0.02 : 0;
      adaptive.spent(own / 2);
      if (task.measured || task.form != kD) {
        const double latency = task.form == kC ? 0.002 : 0.001;
        adaptive.observe(i, task.form, {own / 2, latency + share * dense, own / 2}, share);
      }
      now_ += own / 2;
      end = std::max(end, now_) + share * dense + own / 2;
    }
    now_ = end + 0.1;
    ++number_;
    return forms;
  }
  // What is chosen for both buckets after so many steps.
  Form after(int steps) {
    for (int i = 0; i < steps; ++i) step();
    const Forms forms = adaptive.report().forms;
    EXPECT_EQ(forms.at(0), forms.at(1));
    return forms.at(0);
  }
  double dense;
  Adaptive adaptive{/*collectives=*/2};
  std::vector<uint64_t> agreed;

 private:
  uint64_t number_ = 40;
  double now_ = 5;
};

TEST(Adaptive, TriesEachFormThenChoosesAndChoosesAgain) {
  Simulated slow(10);
  for (const Form form : {kD, kD, kH, kH, kC, kC, kC, kC}) {
    EXPECT_EQ(slow.step(), (Forms{form, form}));
  }
  EXPECT_EQ(slow.after(100), kC);
  EXPECT_EQ(slow.agreed, (std::vector<uint64_t>{46, 70, 94, 118, 142}));
}

TEST(Adaptive, AFastLinkStaysDense) {
  Simulated fast(1e-4);
  fast.after(7);
  EXPECT_EQ(fast.after(1), kD);
  EXPECT_EQ(fast.after(100), kD);
}

TEST(Adaptive, ALinkThatChangesIsFollowedWithin50Steps) {
  for (const int steps_before : {20, 24, 29, 31, 37}) {
    Simulated link(2e-4);
    EXPECT_EQ(link.after(steps_before), kD);
    link.dense = 1;
    EXPECT_EQ(link.after(50), kC) << steps_before;
    link.dense = 2e-4;
    EXPECT_EQ(link.after(50), kD) << steps_before;
  }
}

TEST(Adaptive, ANewBucketBeginsAnew) {
  Simulated link(10);
  link.after(20);
  link.adaptive.forget(60);
  EXPECT_EQ(link.adaptive.report().step, 0);
  for (const Form form : {kD, kD, kH, kH, kC}) EXPECT_EQ(link.step()[0], form);
}

TEST(Adaptive, ReportsWhatItChoseBy) {
  Simulated link(10);
  link.after(8);
  const Adaptive::Report report = link.adaptive.report();
  EXPECT_EQ(report.step, 47);
  EXPECT_EQ(report.forms, (Forms{kC, kC}));
  EXPECT_GT(report.seconds[0], report.seconds[1]);
  EXPECT_GT(report.seconds[1], report.seconds[3]);
}

TEST(Adaptive, OfAllRanksTheLeastCounts) {
  const auto meeting = std::make_shared<testing::Meeting>(2);
  std::array<std::vector<double>, 2> numbers{std::vector<double>{1, 5}, {3, 2}};
  const auto one_rank = [&](int rank) {
    Lanes lanes;
    Metrics metrics;
    const auto group = c10::make_intrusive<testing::ThreadGroup>(meeting, rank);
    Collectives collectives(lanes);
    collectives.begin(*group, metrics);
    collectives.least(numbers[rank]);
  };
  std::thread other(one_rank, 1);
  one_rank(0);
  other.join();
  for (const auto& least : numbers) EXPECT_EQ(least, (std::vector<double>{1, 2}));
}

// --- in the engine ---

// One rank over a link of so many seconds a byte.
class LinkGroup final : public c10d::ProcessGroup {
 public:
  explicit LinkGroup(const double& seconds_a_byte)
      : ProcessGroup(0, 1), seconds_a_byte_(seconds_a_byte) {}
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions&) override {
    const double bytes = static_cast<double>(tensors.at(0).nbytes());
    std::this_thread::sleep_for(std::chrono::duration<double>(bytes * seconds_a_byte_));
    auto work = c10::make_intrusive<testing::DoneWork>();
    work->future =
        c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    work->future->markCompleted(tensors);
    return work;
  }
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions&) override {
    outputs.at(0).at(0).copy_(inputs.at(0));
    return allreduce(inputs, {});
  }
  const std::string getBackendName() const override { return "link"; }

 private:
  const double& seconds_a_byte_;
};

at::Tensor averaged(const testing::Future& future) {
  const c10::IValue value = future->value();
  return value.isTensor() ? value.toTensor() : value.toTensorVector().at(0);
}

class AdaptiveEngineTest : public ::testing::TestWithParam<const char*> {};

// Small integers: float32 sums and bfloat16 hold them exactly. What low rank leaves owed is none,
// and bfloat16 rounds it when it is given back.
TEST_P(AdaptiveEngineTest, WhatIsOwedComesOutWhateverTheForm) {
  double seconds_a_byte = 0;
  Config config;
  config.compressor = GetParam();
  config.sketch_dim = 1;
  config.adaptive = true;
  const auto link = [&] { return c10::make_intrusive<LinkGroup>(seconds_a_byte); };
  Exchange engine(config, Groups{link(), link(), link()});
  const std::vector<testing::OneBucket> buckets{testing::OneBucket(4096), testing::OneBucket(5000)};
  std::vector<at::Tensor> owed;
  for (const auto& b : buckets) owed.push_back(at::zeros_like(b.gradient, at::kDouble));
  // Slow, fast, slow again: 13 ms a dense bucket, or next to nothing. Where the hook's own work
  // takes longer than that, by a sanitizer or on a busy machine, the link becomes as slow as it
  // must.
  double slowness = 5e-8;
  size_t came = 0;
  for (int step = 0, since = 0; step < 2000 && came < 3; ++step, ++since) {
    const bool slow = came != 1;
    if (slow && since % 40 == 39) slowness *= 2;
    seconds_a_byte = slow ? slowness : 0;
    std::vector<testing::Future> futures;
    std::vector<at::Tensor> given;
    for (size_t i = 0; i < buckets.size(); ++i) {
      given.push_back(at::randint(-4, 5, buckets[i].gradient.sizes()).to(at::kFloat));
      owed[i].add_(given[i]);
      futures.push_back(engine.start(given[i], buckets[i].parameters, static_cast<int64_t>(i)));
    }
    for (size_t i = 0; i < buckets.size(); ++i) {
      futures[i]->waitAndThrow();
      owed[i].sub_(averaged(futures[i]));
    }
    const auto report = engine.choice();
    ASSERT_TRUE(report.has_value());
    if (report->step == 0 || (report->forms[0] == kC) != slow) continue;
    ++came;
    since = 0;
  }
  EXPECT_EQ(came, 3);
  const Exchange::Saved saved = engine.snapshot();
  for (size_t i = 0; i < buckets.size(); ++i) {
    const auto& kept = saved.slots[2 * i].second;
    ASSERT_TRUE(kept.has_value());
    const at::Tensor matrix = owed[i].narrow(0, 0, kept->own_a.numel());
    const double rounded = config.compressor == "low_rank" ? 0.5 : 0;
    EXPECT_LE((matrix - kept->own_a.flatten()).abs().max().item<double>(), rounded);
    const int64_t rest = owed[i].numel() - matrix.numel();
    EXPECT_EQ(owed[i].narrow(0, matrix.numel(), rest).abs().max().item<double>(), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Compressors, AdaptiveEngineTest,
                         ::testing::Values("arc_topk", "rand_k", "top_k", "low_rank"));

// What a rank owes is its own, and no reason to go another way than the others: nobody would meet
// it there. Each collective takes long and its bytes nothing, so one is better than two.
TEST(AdaptiveEngine, ARankThatOwesLongerGoesTheSameWay) {
  const int ranks = 2;
  Config config;
  config.adaptive = true;
  const testing::OneBucket bucket(64);  // nobody is bound: a gradient of zeros may stand for none
  std::array<std::shared_ptr<testing::Meeting>, 3> meetings;
  for (auto& meeting : meetings) meeting = std::make_shared<testing::Meeting>(ranks);
  std::array<Form, ranks> chosen_forms{};
  std::array<double, ranks> owed{};
  const auto one_rank = [&](int rank) {
    std::array<c10::intrusive_ptr<testing::ThreadGroup>, 3> groups;
    for (size_t i = 0; i < 3; ++i) {
      groups[i] = c10::make_intrusive<testing::ThreadGroup>(meetings[i], rank);
      groups[i]->latency = std::chrono::milliseconds(20);
    }
    Exchange engine(config, Groups{groups[0], groups[1], groups[2]});
    for (int step = 0; step < 16; ++step) {
      at::Tensor gradient = at::ones_like(bucket.gradient);
      if (rank == 1 && step >= 6) gradient.zero_();
      engine.start(gradient, bucket.parameters, 0)->waitAndThrow();
    }
    chosen_forms[rank] = engine.choice()->forms.at(0);
    owed[rank] = engine.snapshot().slots[0].second->own_a.abs().sum().item<double>();
  };
  std::thread other(one_rank, 1);
  one_rank(0);
  other.join();
  EXPECT_EQ(chosen_forms[0], chosen_forms[1]);
  EXPECT_NE(chosen_forms[0], kC);
  EXPECT_EQ(owed[0], 0);
  EXPECT_GT(owed[1], 0);
}

TEST(AdaptiveEngine, APlainAverageThatIsNotFiniteHasPaidNothing) {
  double seconds_a_byte = 0;
  Config config;
  config.adaptive = true;
  const auto link = [&] { return c10::make_intrusive<LinkGroup>(seconds_a_byte); };
  Exchange engine(config, Groups{link(), link(), link()});
  const testing::OneBucket bucket(64);
  at::Tensor owed = at::zeros_like(bucket.gradient, at::kDouble);
  for (int step = 0; step < 9; ++step) {
    if (step == 7) {  // all forms have been tried; over other groups dense is the first again
      engine.stop();
      engine.resume(Groups{link(), link(), link()}, 7, /*afresh=*/false);
    }
    at::Tensor given = at::randint(-4, 5, bucket.gradient.sizes()).to(at::kFloat);
    const bool broken = step == 7;
    const at::Tensor before = given.to(at::kDouble);
    if (!broken) owed.add_(given);
    if (broken) given[3] = std::numeric_limits<float>::infinity();
    const auto future = engine.start(given, bucket.parameters, 0);
    future->waitAndThrow();
    const at::Tensor mean = averaged(future).to(at::kDouble);
    if (!broken) owed.sub_(mean);
    if (!broken) continue;
    EXPECT_TRUE(std::isinf(mean[3].item<double>()));
    // What has come out of the others beside their gradients was owed.
    owed.sub_(at::where(mean.isfinite(), mean - before, 0));
  }
  EXPECT_EQ(owed.abs().max().item<double>(), 0);
}

}  // namespace
}  // namespace arc_topk
