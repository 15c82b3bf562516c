// Who issues collectives, and in what order. Gloo matches collectives by the order in which they
// are made, and its wait() blocks; so one thread makes them all, bucket after bucket, the same on
// every rank whatever the timing. No collective is ever issued from another one's callback: that
// aborts.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

namespace arc_topk {

class Lane {
 public:
  // A bucket's turn. The lane neither owns nor allocates jobs: a queue of them costs nothing.
  class Job {
   public:
    virtual ~Job() = default;
    virtual void run() noexcept = 0;

   private:
    friend class Lane;
    Job* next_ = nullptr;
  };

  Lane() = default;
  ~Lane();  // runs what was submitted, then joins
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  void submit(Job& job);

 private:
  void loop();

  std::mutex mutex_;
  std::condition_variable work_;
  Job* head_ = nullptr;
  Job* tail_ = nullptr;
  bool closing_ = false;
  std::thread thread_;  // started by the first job: a state that is only pickled has none
};

}  // namespace arc_topk
