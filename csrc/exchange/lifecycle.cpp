#include "exchange/lifecycle.h"

#include <stdexcept>

namespace arc_topk {

void Lifecycle::check_running() const {
  const std::lock_guard lock(mutex_);
  switch (condition_) {
    case Condition::kRunning:
      return;
    case Condition::kDraining:
      throw std::runtime_error(
          "arc_topk: another thread is just changing this engine's buckets; expected one thread to "
          "start them");
    case Condition::kFailed:
      throw std::runtime_error(
          "arc_topk: nothing is exchanged after this failure; wrap the model in a new "
          "DistributedDataParallel and bind the state to it, or make a new GradientExchange, on "
          "every rank: " +
          failure_);
    case Condition::kClosed:
      throw std::runtime_error(
          "arc_topk: this engine was stopped by a bind() that did not succeed; bind the state "
          "again, on every rank");
  }
}

std::string Lifecycle::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void Lifecycle::fail(const std::string& text) {
  const std::lock_guard lock(mutex_);
  if (!failure_.empty()) return;
  failure_ = text;
  if (condition_ == Condition::kRunning) condition_ = Condition::kFailed;
}

void Lifecycle::close() {
  const std::lock_guard lock(mutex_);
  condition_ = Condition::kClosed;
}

void Lifecycle::open() {
  const std::lock_guard lock(mutex_);
  condition_ = Condition::kRunning;
  failure_.clear();
}

Lifecycle::Draining::Draining(Lifecycle& lifecycle) : lifecycle_(lifecycle) {
  const std::lock_guard lock(lifecycle_.mutex_);
  if (lifecycle_.condition_ == Condition::kRunning) lifecycle_.condition_ = Condition::kDraining;
}

Lifecycle::Draining::~Draining() {
  const std::lock_guard lock(lifecycle_.mutex_);
  if (lifecycle_.condition_ != Condition::kDraining) return;
  lifecycle_.condition_ = lifecycle_.failure_.empty() ? Condition::kRunning : Condition::kFailed;
}

}  // namespace arc_topk
