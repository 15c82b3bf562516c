// Who issues collectives, and in what order. Gloo matches collectives by the order in which they
// are made, and its wait() blocks; so one thread makes them all, bucket after bucket, the same on
// every rank whatever the timing. No collective is ever issued from another one's callback: that
// aborts.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <thread>

namespace c10d {
class Work;
}

namespace arc_topk {

class CommThread {
 public:
  // A bucket's turn. The thread neither owns nor allocates jobs: a queue of them costs nothing.
  class Job {
   public:
    virtual ~Job() = default;
    // Exactly one of these, once a submission.
    virtual void run() noexcept = 0;
    virtual void give_up() noexcept = 0;  // its turn will not come

   private:
    friend class CommThread;
    Job* next_ = nullptr;
  };

  CommThread();
  ~CommThread();  // stop()
  CommThread(const CommThread&) = delete;
  CommThread& operator=(const CommThread&) = delete;

  // Throws where no thread can be had; the job is then not submitted.
  void submit(Job& job);

  // Waits until all that was submitted has run; whether it has, before the time was up. Not from a
  // job.
  bool drain(std::optional<std::chrono::milliseconds> at_most = std::nullopt);

  // Ends the thread: the job that runs is interrupted where it waits, the others are given up. From
  // a job it does not wait for that job, which must then touch nothing of this object any more. The
  // next submit() begins anew.
  void stop();

  // From a job, in place of work.wait(): throws std::runtime_error once stop() is called.
  void wait(c10d::Work& work);

  bool is_current() const;

 private:
  struct Queue;
  static void loop(const std::shared_ptr<Queue>& queue);

  // Shared with the thread, and with what still waits in a process group after stop().
  std::shared_ptr<Queue> queue_;
  std::thread thread_;  // started by the first job: a state that is only pickled has none
};

}  // namespace arc_topk
