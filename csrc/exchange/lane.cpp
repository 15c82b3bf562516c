#include "exchange/lane.h"

namespace arc_topk {

Lane::~Lane() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  work_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void Lane::submit(Job& job) {
  {
    const std::lock_guard lock(mutex_);
    job.next_ = nullptr;
    (head_ == nullptr ? head_ : tail_->next_) = &job;
    tail_ = &job;
    if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  }
  work_.notify_one();
}

void Lane::loop() {
  for (;;) {
    Job* job = nullptr;
    {
      std::unique_lock lock(mutex_);
      work_.wait(lock, [this] { return head_ != nullptr || closing_; });
      if (head_ == nullptr) return;
      job = head_;
      head_ = job->next_;
    }
    // The job may be submitted again as soon as it has run: it is off the queue already.
    job->run();
  }
}

}  // namespace arc_topk
