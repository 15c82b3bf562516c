// A process group whose ranks are threads of this process: what the engine does across ranks, in
// milliseconds and without a network. Each collective is a barrier, the sum, and a barrier.
#pragma once

#include <barrier>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

namespace arc_topk::testing {

// What the ranks of one group share.
struct Meeting {
  explicit Meeting(int size) : size(size), barrier(size), offered(size) {}
  const int size;
  std::barrier<> barrier;
  std::vector<at::Tensor> offered;
};

class DoneWork final : public c10d::Work {
 public:
  bool isCompleted() override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future; }
  c10::intrusive_ptr<c10::ivalue::Future> future;
};

class ThreadGroup final : public c10d::ProcessGroup {
 public:
  ThreadGroup(std::shared_ptr<Meeting> meeting, int rank)
      : ProcessGroup(rank, meeting->size),
        meeting_(std::move(meeting)),
        work_(c10::make_intrusive<DoneWork>()) {}

  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override {
    if (!failure.empty()) throw std::runtime_error(failure);
    ++collectives;
    std::this_thread::sleep_for(latency);
    at::Tensor& mine = tensors.at(0);
    if (getSize() > 1) {
      meeting_->offered[getRank()] = mine;
      meeting_->barrier.arrive_and_wait();
      const bool least = options.reduceOp == c10d::ReduceOp::MIN;
      at::Tensor reduced = meeting_->offered[0].clone();
      for (int rank = 1; rank < getSize(); ++rank) {
        const at::Tensor& theirs = meeting_->offered[rank];
        least ? reduced.copy_(at::minimum(reduced, theirs)) : reduced.add_(theirs);
      }
      meeting_->barrier.arrive_and_wait();
      mine.copy_(reduced);
    }
    if (corrupt) corrupt(mine);
    return done(mine);
  }

  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions&) override {
    ++collectives;
    meeting_->offered[getRank()] = inputs.at(0);
    meeting_->barrier.arrive_and_wait();
    for (int rank = 0; rank < getSize(); ++rank)
      outputs.at(0).at(rank).copy_(meeting_->offered[rank]);
    if (corrupt) corrupt(outputs.at(0).at(0));
    meeting_->barrier.arrive_and_wait();
    return work_;
  }

  const std::string getBackendName() const override { return "threads"; }

  int collectives = 0;
  std::chrono::milliseconds latency{0};      // of each sum
  std::string failure;                       // what the next collective throws, if not empty
  std::function<void(at::Tensor&)> corrupt;  // what has arrived on this rank

 private:
  c10::intrusive_ptr<c10d::Work> done(const at::Tensor& tensor) {
    if (!work_->future) {
      work_->future =
          c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
      work_->future->markCompleted(std::vector<at::Tensor>{tensor});
    }
    return work_;
  }

  const std::shared_ptr<Meeting> meeting_;
  const c10::intrusive_ptr<DoneWork> work_;
};

// body(rank, group) on as many threads as there are ranks.
template <class Body>
void on_ranks(int world_size, const Body& body) {
  const auto meeting = std::make_shared<Meeting>(world_size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world_size; ++rank) {
    threads.emplace_back(
        [&, rank] { body(rank, c10::make_intrusive<ThreadGroup>(meeting, rank)); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace arc_topk::testing
