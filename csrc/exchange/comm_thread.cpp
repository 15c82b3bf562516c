#include "exchange/comm_thread.h"

#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>

namespace arc_topk {

struct CommThread::Queue {
  std::mutex mutex;
  std::condition_variable changed;  // anything below, or a collective has ended
  Job* head = nullptr;
  Job* tail = nullptr;
  bool running = false;     // a job
  uint64_t generation = 0;  // counts stops: a thread is through once it is not its own any more

  bool idle() const { return head == nullptr && !running; }
};

namespace {

// Whose thread this is. The queue lives as long as its threads.
struct Here {
  const void* queue = nullptr;
  uint64_t generation = 0;
};
thread_local Here here;

}  // namespace

CommThread::CommThread() : queue_(std::make_shared<Queue>()) {}

CommThread::~CommThread() { stop(); }

void CommThread::start() {
  if (thread_.joinable()) return;
  uint64_t generation = 0;
  {
    const std::lock_guard lock(queue_->mutex);
    generation = queue_->generation;
  }
  thread_ = std::thread([queue = queue_, generation] { loop(queue, generation); });
}

void CommThread::submit(Job& job) {
  Queue& queue = *queue_;
  {
    const std::lock_guard lock(queue.mutex);
    job.next_ = nullptr;
    (queue.head == nullptr ? queue.head : queue.tail->next_) = &job;
    queue.tail = &job;
  }
  queue.changed.notify_all();
}

bool CommThread::drain(std::optional<std::chrono::milliseconds> at_most) {
  if (is_current()) {
    throw std::logic_error(
        "arc_topk: buckets cannot change from within a callback of a bucket's future; expected the "
        "thread that runs the backward pass");
  }
  Queue& queue = *queue_;
  std::unique_lock lock(queue.mutex);
  const auto idle = [&] { return queue.idle(); };
  if (at_most) return queue.changed.wait_for(lock, *at_most, idle);
  queue.changed.wait(lock, idle);
  return true;
}

void CommThread::stop() {
  if (!thread_.joinable()) return;
  const std::shared_ptr<Queue> queue = queue_;
  Job* left = nullptr;
  {
    const std::lock_guard lock(queue->mutex);
    ++queue->generation;
    left = std::exchange(queue->head, nullptr);
  }
  queue->changed.notify_all();
  if (thread_.get_id() == std::this_thread::get_id()) {
    thread_.detach();
  } else {
    thread_.join();
  }
  {
    const std::lock_guard lock(queue->mutex);
    queue->running = false;
  }
  while (left != nullptr) std::exchange(left, left->next_)->give_up();
}

// Polls nothing: the collective's own end and stop() both wake it.
void CommThread::wait(c10d::Work& work) {
  const auto future = work.getFuture();
  if (future && !future->completed()) {
    const std::shared_ptr<Queue> queue = queue_;
    const auto wake = [queue](c10::ivalue::Future&) {
      { const std::lock_guard lock(queue->mutex); }  // not between the waiter's look and its sleep
      queue->changed.notify_all();
    };
    future->addCallback(wake, /*uses_future=*/false);
    std::unique_lock lock(queue->mutex);
    const uint64_t mine = here.generation;
    queue->changed.wait(lock, [&] { return future->completed() || queue->generation != mine; });
    if (!future->completed()) {
      throw std::runtime_error(
          "given up while it waited for the other ranks: the engine was let go");
    }
  }
  work.wait();
}

bool CommThread::is_current() const {
  if (here.queue != queue_.get()) return false;
  const std::lock_guard lock(queue_->mutex);
  return here.generation == queue_->generation;
}

void CommThread::loop(const std::shared_ptr<Queue>& queue, uint64_t generation) {
  here = {queue.get(), generation};
  for (;;) {
    Job* job = nullptr;
    {
      std::unique_lock lock(queue->mutex);
      if (queue->generation != generation) return;
      queue->running = false;
      if (queue->head == nullptr) queue->changed.notify_all();
      queue->changed.wait(
          lock, [&] { return queue->head != nullptr || queue->generation != generation; });
      if (queue->generation != generation) return;
      job = queue->head;
      queue->head = job->next_;
      queue->running = true;
    }
    // The job may be submitted again as soon as it has run: it is off the queue already. It may
    // also have let the engine go: nothing of it is touched from here on.
    job->run();
  }
}

}  // namespace arc_topk
