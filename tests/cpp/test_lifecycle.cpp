// The engine's life, on groups whose collectives end when a test says so.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <fstream>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

#include "error_of.h"
#include "exchange/exchange.h"
#include "gated_group.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::error_of;
using ::arc_topk::testing::Future;
using ::arc_topk::testing::GatedGroup;
using ::arc_topk::testing::OneBucket;
using std::chrono::steady_clock;

void expect_contains(const std::string& text, const std::string& words) {
  EXPECT_NE(text.find(words), std::string::npos) << "'" << text << "' without '" << words << "'";
}

class LifecycleTest : public ::testing::Test {
 protected:
  LifecycleTest()
      : group_(c10::make_intrusive<GatedGroup>()), comm_(c10::make_intrusive<GatedGroup>()) {
    engine_ = std::make_unique<Exchange>(Config{}, Groups{group_, comm_});
  }
  ~LifecycleTest() override { comm_->open(); }

  Future start(const OneBucket& bucket) {
    return engine_->start(bucket.gradient, bucket.parameters, 3);
  }
  // Until the engine waits in the collective.
  void wait_for_collective(int number) const {
    while (comm_->collectives < number) std::this_thread::yield();
  }

  c10::intrusive_ptr<GatedGroup> group_, comm_;
  std::unique_ptr<Exchange> engine_;
};

TEST_F(LifecycleTest, ABucketInTheAirIsRefusedUntouched) {
  const OneBucket bucket;
  comm_->close();
  const Future first = start(bucket);
  wait_for_collective(1);
  const at::Tensor before = bucket.gradient.clone();
  const std::string text = error_of([&] { start(bucket); });
  expect_contains(text, "still being exchanged");
  expect_contains(text, "bucket 3");
  EXPECT_TRUE(bucket.gradient.equal(before));
  comm_->open();
  first->waitAndThrow();
  start(bucket)->waitAndThrow();
  EXPECT_EQ(engine_->metrics().steps, 2U);
}

TEST_F(LifecycleTest, ABucketQueuedBehindAnotherIsRefusedToo) {
  const OneBucket one, two;
  comm_->close();
  const Future first = start(one);
  const Future second = start(two);
  expect_contains(error_of([&] { start(two); }), "still being exchanged");
  comm_->open();
  first->waitAndThrow();
  second->waitAndThrow();
}

TEST_F(LifecycleTest, ABucketWhoseFutureIsDroppedIsExchangedAllTheSame) {
  const OneBucket bucket;
  comm_->close();
  start(bucket);
  wait_for_collective(1);
  expect_contains(error_of([&] { start(bucket); }), "still being exchanged");
  comm_->open();
  while (engine_->metrics().exchanges < 1) std::this_thread::yield();
  while (!error_of([&] { start(bucket)->waitAndThrow(); }).empty()) std::this_thread::yield();
  EXPECT_EQ(engine_->metrics().steps, 2U);
}

TEST_F(LifecycleTest, BucketsThatChangeWaitForWhatIsInTheAir) {
  const OneBucket bucket;
  comm_->close();
  const Future first = start(bucket);
  wait_for_collective(1);
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    comm_->open();
  });
  // The same parameters, the other way around: the old bucket goes.
  const std::vector<at::Tensor> other{bucket.parameters[1], bucket.parameters[0]};
  const at::Tensor gradient = at::randn({64 * 16 + 5});
  const Future second = engine_->start(gradient, other, 0);
  EXPECT_TRUE(first->completed());
  EXPECT_FALSE(first->hasError());
  second->waitAndThrow();
  opener.join();
}

TEST_F(LifecycleTest, StoppingGivesUpWhatHangsAndWhatIsQueued) {
  const OneBucket one, two;
  comm_->close();
  const Future first = start(one);
  const Future second = start(two);
  wait_for_collective(1);
  const int gone = GatedGroup::gone;
  comm_.reset();  // the engine's alone
  engine_->stop();
  expect_contains(first->tryRetrieveErrorMessage(), "given up");
  expect_contains(first->tryRetrieveErrorMessage(), "phase first_collective");
  EXPECT_TRUE(second->hasError());
  expect_contains(error_of([&] { start(one); }), "stopped");
  // The hanging group goes in its own time, on a thread of its own.
  while (GatedGroup::gone == gone) std::this_thread::yield();

  comm_ = c10::make_intrusive<GatedGroup>();
  engine_->resume({group_, comm_}, 7, /*afresh=*/false);
  start(one)->waitAndThrow();
  start(two)->waitAndThrow();
  EXPECT_EQ(engine_->metrics().steps, 8U);
}

TEST_F(LifecycleTest, GoingDoesNotWaitForACollectiveThatHangs) {
  const OneBucket bucket;
  comm_->close();
  const Future future = start(bucket);
  wait_for_collective(1);
  std::atomic<bool> went{false};
  std::thread watch([&] {
    for (int i = 0; i < 600 && !went; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    if (!went) comm_->open();  // else the test would hang as well
    EXPECT_TRUE(went);
  });
  engine_.reset();
  went = true;
  watch.join();
  EXPECT_TRUE(future->hasError());
}

TEST_F(LifecycleTest, TheEngineMayGoInACallbackOfItsOwnFuture) {
  const OneBucket one, two;
  comm_->close();
  const Future first = start(one);
  const Future second = start(two);
  std::atomic<bool> called{false};
  first->addCallback([&](c10::ivalue::Future&) {
    engine_.reset();
    called = true;
  });
  comm_->open();
  first->wait();
  second->wait();
  while (!called) std::this_thread::yield();
  EXPECT_FALSE(first->hasError());
  // Its lanes run beside the callback: it may be anywhere by then, or through.
  if (second->hasError())
    expect_contains(second->tryRetrieveErrorMessage(), "the engine was let go");
}

TEST_F(LifecycleTest, ABucketInTheAirCannotBeTakenApartFromACallback) {
  const OneBucket one, two;
  const std::vector<at::Tensor> other{two.parameters[1], two.parameters[0]};
  comm_->close();
  const Future first = start(one);
  const Future second = start(two);  // its turn comes behind the callback
  std::atomic<bool> called{false};
  std::string text;
  first->addCallback([&](c10::ivalue::Future&) {
    text = error_of([&] { engine_->start(at::randn({64 * 16 + 5}), other, 0); });
    called = true;
  });
  comm_->open();
  while (!called) std::this_thread::yield();
  expect_contains(text, "from within a callback");
  second->waitAndThrow();
}

TEST_F(LifecycleTest, ABucketThatHasEndedMayBeTakenApartEvenInItsOwnCallback) {
  const OneBucket bucket;
  const std::vector<at::Tensor> other{bucket.parameters[1], bucket.parameters[0]};
  comm_->close();
  const Future first = start(bucket);
  std::atomic<bool> called{false};
  Future second;
  first->addCallback([&](c10::ivalue::Future&) {
    second = engine_->start(at::randn({64 * 16 + 5}), other, 0);
    called = true;
  });
  comm_->open();
  while (!called) std::this_thread::yield();
  second->waitAndThrow();
  EXPECT_EQ(engine_->metrics().steps, 2U);
}

TEST_F(LifecycleTest, MetricsAreReadWhileBucketsComeAndGo) {
  std::atomic<bool> done{false};
  std::thread logger([&] {
    while (!done) engine_->metrics();
  });
  for (int i = 0; i < 50; ++i) {
    const OneBucket bucket;
    for (int step = 0; step < 3; ++step) start(bucket)->waitAndThrow();
  }
  done = true;
  logger.join();
  EXPECT_EQ(engine_->metrics().exchanges, 150U);
}

TEST_F(LifecycleTest, ABucketsBufferIsNotHeldBetweenSteps) {
  OneBucket bucket;
  // Threads let go of a future and its value in their own time.
  const auto expect_let_go = [&] {
    const auto deadline = steady_clock::now() + std::chrono::seconds(60);
    while (bucket.gradient.use_count() > 1 && steady_clock::now() < deadline) {
      std::this_thread::yield();
    }
    EXPECT_EQ(bucket.gradient.use_count(), 1U);
  };
  start(bucket)->waitAndThrow();
  expect_let_go();
  Config dense;
  dense.compressor = "dense";
  Exchange averaging(dense, {group_, comm_});
  averaging.start(bucket.gradient, bucket.parameters, 0)->waitAndThrow();
  expect_let_go();
}

// Whatever fails once a bucket has begun may have changed its state, and leaves the other ranks in
// a step that this one cannot meet: the engine has failed, and goes on behind stop() and resume().
TEST_F(LifecycleTest, WhatFailsBehindTheBeginningFailsTheEngine) {
  const OneBucket bucket;
  group_->refuses = true;
  Config dense;
  dense.compressor = "dense";
  engine_ = std::make_unique<Exchange>(dense, Groups{group_, comm_});
  const std::string started = error_of([&] { start(bucket); });
  expect_contains(started, "rank 0, bucket 3");
  expect_contains(started, "the group refuses");
  expect_contains(error_of([&] { start(bucket); }), "nothing is exchanged after this failure");
  engine_ = std::make_unique<Exchange>(Config{}, Groups{group_, comm_});
  const auto run = [&] { engine_->run(bucket.gradient, bucket.parameters); };
  expect_contains(error_of(run), "the group refuses");
  group_->refuses = false;
  expect_contains(error_of(run), "nothing is exchanged after this failure");
  engine_->stop();
  engine_->resume({group_, comm_}, 1, /*afresh=*/false);
  EXPECT_EQ(error_of(run), "");
}

// A thread's memory that cannot be had: of more than the process may have in all.
class NoMemoryForThreads {
 public:
  NoMemoryForThreads() {
    constexpr size_t kStack = size_t{1} << 30;
    pthread_getattr_default_np(&before_);
    pthread_attr_t large;
    pthread_getattr_default_np(&large);
    pthread_attr_setstacksize(&large, kStack);
    pthread_setattr_default_np(&large);
    pthread_attr_destroy(&large);
    getrlimit(RLIMIT_AS, &limit_);
    size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    rlimit low = limit_;
    low.rlim_cur = pages * static_cast<size_t>(sysconf(_SC_PAGESIZE)) + kStack / 2;
    setrlimit(RLIMIT_AS, &low);
  }
  ~NoMemoryForThreads() {
    setrlimit(RLIMIT_AS, &limit_);
    pthread_setattr_default_np(&before_);
    pthread_attr_destroy(&before_);
  }

 private:
  pthread_attr_t before_;
  rlimit limit_;
};

TEST_F(LifecycleTest, AThreadThatCannotBeHadIsAnErrorAndNothingIsQueued) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers make threads in their own way";
#endif
  const OneBucket bucket;
  {
    const NoMemoryForThreads none;
    expect_contains(error_of([&] { start(bucket); }), "bucket 3");
  }
  EXPECT_EQ(comm_->collectives, 0);
  expect_contains(error_of([&] { start(bucket); }), "nothing is exchanged after this failure");
  engine_->stop();
  engine_->resume({group_, comm_}, 0, /*afresh=*/false);
  start(bucket)->waitAndThrow();
  EXPECT_EQ(comm_->collectives, 2);
}

TEST_F(LifecycleTest, AStateKeepsNoParameterAlive) {
  auto bucket = std::make_unique<OneBucket>();
  start(*bucket)->waitAndThrow();
  const c10::weak_intrusive_ptr<c10::TensorImpl> parameter(bucket->parameters[0].getIntrusivePtr());
  bucket.reset();
  EXPECT_TRUE(parameter.expired());
}

TEST_F(LifecycleTest, OneThreadAtATime) {
  const OneBucket bucket;
  comm_->close();
  const Future first = start(bucket);
  wait_for_collective(1);
  std::atomic<bool> entered{false};
  const std::vector<at::Tensor> other{bucket.parameters[1], bucket.parameters[0]};
  const at::Tensor gradient = at::randn({64 * 16 + 5});
  std::thread changing([&] {  // waits for what is in the air, once it is in: either may be refused
    entered = true;
    Future second;
    while (!second) error_of([&] { second = engine_->start(gradient, other, 0); });
    second->wait();
  });
  while (!entered) std::this_thread::yield();
  std::string text;
  const auto deadline = steady_clock::now() + std::chrono::seconds(60);
  while (text.find("two threads") == std::string::npos && steady_clock::now() < deadline) {
    text = error_of([&] { start(bucket); });  // "still being exchanged" until the other is in
  }
  expect_contains(text, "two threads");
  comm_->open();
  changing.join();
  first->waitAndThrow();
}

}  // namespace
}  // namespace arc_topk
