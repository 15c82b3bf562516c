// Who issues a group's collectives, and in what order. Gloo matches collectives by the order in
// which they are made, and its wait() blocks; so one thread makes them all, bucket after bucket,
// the same on every rank whatever the timing. No collective is ever issued from another one's
// callback: that aborts.
#pragma once

#include <chrono>
#include <cstdint>
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

  // Of no effect on a thread that is there. Throws where none can be had. Not beside stop().
  void start();
  // Behind start(), from any thread.
  void submit(Job& job);

  // Waits until all that was submitted has run; whether it has, before the time was up. Not from a
  // job.
  bool drain(std::optional<std::chrono::milliseconds> at_most = std::nullopt);

  // Ends the thread: the job that runs is interrupted where it waits, the others are given up. From
  // a job it does not wait for that job, which must then touch nothing of this object any more.
  // start() begins anew.
  void stop();

  // From a job, in place of work.wait(): throws std::runtime_error once stop() is called.
  void wait(c10d::Work& work);

  bool is_current() const;

 private:
  struct Queue;
  static void loop(const std::shared_ptr<Queue>& queue, uint64_t generation);

  // Shared with the thread, and with what still waits in a process group after stop(). One for all
  // of its threads: other lanes ask whose they are at any time.
  const std::shared_ptr<Queue> queue_;
  std::thread thread_;
};

}  // namespace arc_topk
