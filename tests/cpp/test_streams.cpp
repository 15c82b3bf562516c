// Buckets on a device with streams: what is queued where, in which order and after what.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <future>

#include "exchange/exchange.h"
#include "fake_device.h"

namespace arc_topk {
namespace {

using ::arc_topk::testing::fake_device;
using ::arc_topk::testing::FakeGuard;
using ::arc_topk::testing::journal;
using ::arc_topk::testing::kFake;
using ::arc_topk::testing::NotingGroup;
using ::arc_topk::testing::NotingKernels;

constexpr int64_t kCaller = 0;  // the stream of the backward pass

struct OneBucket {
  OneBucket()
      : parameters{at::empty({64, 16}), at::empty({5})}, gradient(at::randn({64 * 16 + 5})) {}
  std::vector<at::Tensor> parameters;
  at::Tensor gradient;
};

// CPU tensors that count as the fake device's.
class StreamsTest : public ::testing::Test {
 protected:
  StreamsTest() {
    testing::register_fake_device();
    static const NotingKernels kernels;
    set_backend(c10::kCPU, {&kernels, fake_device()});
    journal().clear();
  }
  ~StreamsTest() override { set_backend(c10::kCPU, {}); }

  static Config config(const char* compressor, FeedbackKind feedback) {
    Config config;
    config.compressor = compressor;
    config.feedback = feedback;
    return config;
  }

  // A backward pass over the buckets: each gradient is written, and its bucket started at once.
  static void step(Exchange& exchange, std::vector<OneBucket>& buckets) {
    std::vector<c10::intrusive_ptr<c10::ivalue::Future>> futures;
    for (OneBucket& bucket : buckets) {
      bucket.gradient.normal_();
      journal().work("backward", kCaller, bucket.gradient.const_data_ptr());
      futures.push_back(exchange.start(bucket.gradient, bucket.parameters, 0));
    }
    for (size_t i = 0; i < buckets.size(); ++i) {
      futures[i]->wait();
      ASSERT_FALSE(futures[i]->hasError()) << futures[i]->tryRetrieveErrorMessage();
      // What a future of device tensors does: it remembers the streams that are current when it is
      // completed (TheFutureIsCompletedOnTheCommunicateStream), and the waiting stream follows
      // them. Of CPU tensors it has no reason to.
      journal().follow(kCaller, journal().last_stream("all_reduce"));
      journal().follow(kCaller, journal().last_stream("all_gather"));
      journal().work("optimizer", kCaller, buckets[i].gradient.const_data_ptr());
    }
  }
};

TEST_F(StreamsTest, OneBucketInOrder) {
  const auto group = c10::make_intrusive<NotingGroup>();
  Exchange exchange(config("arc_topk", FeedbackKind::kEF14), {group, {}});
  std::vector<OneBucket> buckets(1);
  step(exchange, buckets);
  const std::vector<std::string> first = journal().texts();
  const auto stream_of = [&](const std::string& what) {
    const auto at = std::find_if(first.begin(), first.end(),
                                 [&](const std::string& t) { return t.starts_with(what + "@"); });
    return at == first.end() ? std::string("none") : at->substr(what.size());
  };
  const std::string p = stream_of("prepare"), c = stream_of("all_reduce");
  EXPECT_NE(p, c);
  const std::vector<std::string> expected = {
      "backward@0",     "keep" + p,
      "keep" + c,       "record@0",   //
      "current" + p,    "block" + p,  // behind the backward pass
      "project" + p,    "prepare" + p,
      "read V" + p,                             //
      "record" + p,     "current@0",            //
      "current" + c,    "block" + c,            // behind the prepare
      "all_reduce" + c, "wait" + c,             //
      "select" + c,     "pack_and_commit" + c,  //
      "all_reduce" + c, "wait" + c,             //
      "apply" + c,                              //
      "record" + c,     "current@0",            // for the bucket's next step
      "optimizer@0",
  };
  EXPECT_EQ(first, expected);

  // In the next step the bucket also waits for its own last one.
  journal().clear();
  step(exchange, buckets);
  const std::vector<std::string> second = journal().texts();
  EXPECT_EQ(std::count(second.begin(), second.end(), "block" + p), 2);
}

// Whether a scaler has skipped the step before is known on the device alone.
TEST_F(StreamsTest, AStepUnderAScalerBeginsWithWhatTheOneBeforeMayHaveLost) {
  Exchange exchange(config("arc_topk", FeedbackKind::kEF14),
                    {c10::make_intrusive<NotingGroup>(), {}});
  exchange.set_loss_scale(at::full({}, 8.0));
  std::vector<OneBucket> buckets(2);
  const auto count = [](const std::string& what) {
    const auto all = journal().texts();
    return std::count_if(all.begin(), all.end(),
                         [&](const std::string& text) { return text.starts_with(what + "@"); });
  };
  step(exchange, buckets);
  journal().clear();
  step(exchange, buckets);
  EXPECT_EQ(count("reclaim"), 2);
  EXPECT_EQ(journal().last_stream("reclaim"), journal().last_stream("prepare"));

  // When DDP rebuilds its buckets the residuals move, and nothing may be left behind.
  journal().clear();
  std::vector<OneBucket> rebuilt(1);
  rebuilt[0].parameters = {buckets[0].parameters[0], buckets[1].parameters[1]};
  step(exchange, rebuilt);
  EXPECT_EQ(count("reclaim"), 2);
  EXPECT_EQ(journal().last_stream("reclaim"), kCaller);
  EXPECT_EQ(journal().races(), std::vector<std::string>());
}

TEST_F(StreamsTest, NothingOvertakesWhatItNeeds) {
  for (const char* compressor : {"arc_topk", "rand_k", "top_k", "dense"}) {
    for (FeedbackKind feedback :
         {FeedbackKind::kNone, FeedbackKind::kEF14, FeedbackKind::kEF21, FeedbackKind::kEF21M}) {
      for (bool lane : {false, true}) {
        SCOPED_TRACE(std::string(compressor) + ", feedback " +
                     std::to_string(static_cast<int>(feedback)) + (lane ? ", lane" : ""));
        journal().clear();
        const auto group = c10::make_intrusive<NotingGroup>();
        const auto lane_group = c10::make_intrusive<NotingGroup>();
        Exchange exchange(config(compressor, feedback),
                          {group, lane ? lane_group : c10::intrusive_ptr<NotingGroup>()});
        std::vector<OneBucket> buckets(3);
        for (int i = 0; i < 3; ++i) step(exchange, buckets);
        EXPECT_EQ(journal().races(), std::vector<std::string>());
        EXPECT_EQ(FakeGuard::current(), kCaller) << "the caller's stream is current again";
      }
    }
  }
}

TEST_F(StreamsTest, ABucketIsPreparedBesideTheCollectivesOfTheOneBefore) {
  const auto group = c10::make_intrusive<NotingGroup>();
  Exchange exchange(config("arc_topk", FeedbackKind::kEF14), {group, {}});
  std::vector<OneBucket> buckets(2);
  step(exchange, buckets);
  journal().clear();
  // Were the second bucket's prepare behind the first one's apply, an object that both touch would
  // be no race.
  const int object = 0;
  for (OneBucket& bucket : buckets) exchange.start(bucket.gradient, bucket.parameters, 0);
  int64_t prepare = 0, communicate = 0;
  for (const std::string& text : journal().texts()) {
    if (text.starts_with("prepare@")) prepare = std::stoll(text.substr(8));
    if (text.starts_with("apply@")) communicate = std::stoll(text.substr(6));
  }
  journal().work("apply", communicate, &object);
  journal().work("prepare", prepare, &object);
  EXPECT_EQ(journal().races().size(), 1);
}

TEST_F(StreamsTest, TheFutureIsCompletedOnTheCommunicateStream) {
  const auto group = c10::make_intrusive<NotingGroup>();
  std::promise<void> watched;
  group->before_all_reduce = [&, once = true]() mutable {
    if (std::exchange(once, false)) watched.get_future().wait();
  };
  Exchange exchange(config("arc_topk", FeedbackKind::kEF14), {group, group});
  OneBucket bucket;
  const auto future = exchange.start(bucket.gradient, bucket.parameters, 0);
  EXPECT_EQ(future->devices(), std::vector<c10::Device>{fake_device()});
  future->addCallback([](c10::ivalue::Future&) { journal().work("completed", -1); });
  watched.set_value();
  future->wait();
  exchange.start(bucket.gradient, bucket.parameters, 0)->wait();  // the lane is through with it
  // Callbacks get a stream of their own; the one that is current again behind them is the lane's.
  const std::vector<std::string> all = journal().texts();
  const auto completed = std::find(all.begin(), all.end(), "completed@-1");
  ASSERT_LT(completed + 1, all.end());
  EXPECT_EQ(completed[1], "current@" + std::to_string(journal().last_stream("all_reduce")));
}

TEST_F(StreamsTest, TheFakeSeesARace) {
  const int object = 0;
  journal().work("write", 1, &object);
  journal().work("read", 2, &object);
  EXPECT_EQ(journal().races(), std::vector<std::string>{"read@2 may run before write@1"});
}

TEST_F(StreamsTest, AStreamThatIsCapturingIsRefusedAndNothingIsQueued) {
  Exchange exchange(config("arc_topk", FeedbackKind::kEF14),
                    {c10::make_intrusive<NotingGroup>(), {}});
  OneBucket bucket;
  exchange.start(bucket.gradient, bucket.parameters, 0)->wait();
  journal().clear();
  NotingKernels::captures = true;
  EXPECT_THROW(exchange.start(bucket.gradient, bucket.parameters, 0), std::runtime_error);
  EXPECT_THROW(exchange.run(bucket.gradient, bucket.parameters), std::runtime_error);
  NotingKernels::captures = false;
  EXPECT_EQ(journal().texts(), std::vector<std::string>());
  exchange.start(bucket.gradient, bucket.parameters, 0)->waitAndThrow();
}

TEST_F(StreamsTest, AnErrorReachesTheFuture) {
  class Failing final : public c10d::ProcessGroup {
   public:
    Failing() : ProcessGroup(0, 1) {}
    c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>&,
                                             const c10d::AllreduceOptions&) override {
      throw std::runtime_error("no link");
    }
    const std::string getBackendName() const override { return "failing"; }
  };
  Exchange exchange(config("arc_topk", FeedbackKind::kEF14), {c10::make_intrusive<Failing>(), {}});
  OneBucket bucket;
  const auto future = exchange.start(bucket.gradient, bucket.parameters, 7);
  ASSERT_TRUE(future->hasError());
  EXPECT_NE(future->tryRetrieveErrorMessage().find("bucket 7"), std::string::npos);
  EXPECT_EQ(FakeGuard::current(), kCaller);
}

}  // namespace
}  // namespace arc_topk
