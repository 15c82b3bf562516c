// A process group of one rank, whose collectives wait at a gate; and what to exchange over it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

namespace arc_topk::testing {

using Future = c10::intrusive_ptr<c10::ivalue::Future>;

// One rank, whose collectives are done once the gate is open; until then they hang, as they do
// where another rank never comes.
class GatedGroup final : public c10d::ProcessGroup {
 public:
  GatedGroup() : ProcessGroup(0, 1) {}
  // Goes only once its threads are through, as Gloo does: it would hang with them.
  ~GatedGroup() override {
    open();
    for (std::thread& thread : threads_) thread.join();
    ++gone;
  }

  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions&) override {
    if (refuses) throw std::runtime_error("the group refuses");
    auto work = c10::make_intrusive<GatedWork>(tensors);
    const std::lock_guard lock(mutex_);
    ++collectives;
    sizes.push_back(tensors.at(0).numel());
    threads_.emplace_back([this, work, tensors] {
      std::unique_lock gate(mutex_);
      opened_.wait(gate, [this] { return open_; });
      gate.unlock();
      work->future->markCompleted(tensors);
    });
    return work;
  }
  const std::string getBackendName() const override { return "gated"; }

  void open() { set(true); }
  void close() { set(false); }

  std::atomic<int> collectives{0};
  std::vector<int64_t> sizes;  // of what was summed, one after the other
  bool refuses = false;
  static inline std::atomic<int> gone{0};

 private:
  struct GatedWork final : c10d::Work {
    explicit GatedWork(const std::vector<at::Tensor>&)
        : future(c10::make_intrusive<c10::ivalue::Future>(
              c10::ListType::create(c10::TensorType::get()))) {}
    bool isCompleted() override { return future->completed(); }
    bool wait(std::chrono::milliseconds) override {
      future->wait();
      return true;
    }
    Future getFuture() override { return future; }
    const Future future;
  };
  void set(bool open) {
    {
      const std::lock_guard lock(mutex_);
      open_ = open;
    }
    opened_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable opened_;
  bool open_ = true;
  std::vector<std::thread> threads_;
};

// A matrix and a vector, with their gradient.
struct OneBucket {
  explicit OneBucket(int64_t rows = 64) : parameters{at::empty({rows, 16}), at::empty({5})} {
    gradient = at::randn({rows * 16 + 5});
  }
  std::vector<at::Tensor> parameters;
  at::Tensor gradient;
};

}  // namespace arc_topk::testing
