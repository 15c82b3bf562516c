// What runs beside what: first collectives, second ones, and what comes behind both.
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "exchange/exchange.h"
#include "gated_group.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::Future;
using ::arc_topk::testing::GatedGroup;
using ::arc_topk::testing::OneBucket;

class LanesTest : public ::testing::Test {
 protected:
  explicit LanesTest(Config config = {})
      : engine_(config, Groups{c10::make_intrusive<GatedGroup>(), first_, second_}) {}
  ~LanesTest() override { second_->open(); }

  std::vector<Future> start_all() {
    std::vector<Future> futures;
    for (const OneBucket& bucket : buckets_) {
      futures.push_back(
          engine_.start(bucket.gradient, bucket.parameters, static_cast<int64_t>(futures.size())));
    }
    return futures;
  }
  // Whether it comes true, however busy the machine is.
  static bool comes(const std::function<bool()>& what) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    while (!what() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    return what();
  }

  const std::vector<OneBucket> buckets_{OneBucket(64), OneBucket(128), OneBucket(96)};
  c10::intrusive_ptr<GatedGroup> first_ = c10::make_intrusive<GatedGroup>();
  c10::intrusive_ptr<GatedGroup> second_ = c10::make_intrusive<GatedGroup>();
  Exchange engine_;
};

TEST_F(LanesTest, SketchesTravelWhileTheRowsOfTheBucketBeforeDo) {
  second_->close();
  const std::vector<Future> futures = start_all();
  EXPECT_TRUE(comes([&] { return first_->collectives == 3; }));
  EXPECT_LE(second_->collectives, 1);
  for (const Future& future : futures) EXPECT_FALSE(future->completed());
  second_->open();
  for (const Future& future : futures) future->waitAndThrow();
}

TEST_F(LanesTest, ACallbackKeepsNoCollectiveWaiting) {
  const std::vector<Future> futures = start_all();
  bool came = false;
  futures[0]->addCallback(
      [&](c10::ivalue::Future&) { came = comes([&] { return second_->collectives == 3; }); });
  for (const Future& future : futures) future->waitAndThrow();
  EXPECT_TRUE(came);
}

TEST_F(LanesTest, EachGroupsCollectivesAreInTheOrderOfTheBuckets) {
  for (int step = 0; step < 20; ++step) {
    for (const Future& future : start_all()) future->waitAndThrow();
  }
  for (const GatedGroup* group : {first_.get(), second_.get()}) {
    ASSERT_EQ(group->sizes.size(), 60);
    EXPECT_NE(group->sizes[0], group->sizes[1]);
    EXPECT_NE(group->sizes[1], group->sizes[2]);
    for (size_t i = 3; i < 60; ++i) EXPECT_EQ(group->sizes[i], group->sizes[i - 3]);
  }
}

// Buckets of one collective and of two come to the last lane by different ways.
TEST(Lanes, BucketsWithAndWithoutASecondCollectiveMix) {
  Config config;
  config.wire_dtype = DType::kBF16;
  config.sketch_dtype = DType::kBF16;
  const OneBucket matrix(64);
  const std::vector<at::Tensor> vector{at::empty({7})};
  const at::Tensor gradient = at::randn({7});
  for (int engine = 0; engine < 50; ++engine) {
    const auto first = c10::make_intrusive<GatedGroup>(),
               second = c10::make_intrusive<GatedGroup>();
    Exchange exchange(config, Groups{c10::make_intrusive<GatedGroup>(), first, second});
    for (int step = 0; step < 2; ++step) {
      const Future one = exchange.start(matrix.gradient, matrix.parameters, 0);
      const Future two = exchange.start(gradient, vector, 1);
      one->waitAndThrow();
      two->waitAndThrow();
    }
    ASSERT_EQ(first->collectives, 4);
    ASSERT_EQ(second->collectives, 2);
  }
}

class OneCollectiveTest : public LanesTest {
 protected:
  static Config rand_k() {
    Config config;
    config.compressor = "rand_k";
    return config;
  }
  OneCollectiveTest() : LanesTest(rand_k()) {}
};

TEST_F(OneCollectiveTest, TheSecondGroupIsNotUsed) {
  for (const Future& future : start_all()) future->waitAndThrow();
  EXPECT_EQ(first_->collectives, 3);
  EXPECT_EQ(second_->collectives, 0);
}

}  // namespace
}  // namespace arc_topk
