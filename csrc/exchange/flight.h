// One bucket in flight: carries it through one step after the other, on the thread that prepares
// and then on the lane's. Made once per bucket and used again every step.
#pragma once

#include <ATen/ThreadLocalState.h>
#include <ATen/core/ivalue.h>

#include <array>
#include <chrono>
#include <optional>
#include <string>

#include "exchange/exchange.h"
#include "exchange/span.h"

namespace arc_topk {

// What a step does with a bucket.
enum class Mode : uint8_t {
  kAverage,  // plain averaging: before start_step, or nothing is compressed or remembered
  kStart,    // EF21, EF21M: the dense first step, v_i = h_i = g_i, h = mean g
  kCompress,
};

class Flight final : public Step, public Lane::Job {
 public:
  Flight(Exchange& exchange, BucketState& state);

  // On the calling thread: all that can be done before the bucket's turn.
  void prepare(int64_t index);
  // In the bucket's turn: the rest, into the future. With streams and without a lane, all of it is
  // only queued.
  void run() noexcept override;
  // The whole step on the calling thread and its current stream. The averaged bucket.
  at::Tensor run_here(c10d::ProcessGroup& group);

  // Whether the step is one all-reduce in place and nothing else.
  bool only_averages() const { return mode_ == Mode::kAverage; }
  c10::intrusive_ptr<c10::ivalue::Future> average(c10d::ProcessGroup& group);
  // Makes the future that run() completes.
  c10::intrusive_ptr<c10::ivalue::Future> promise();

  const Plan& plan() const override { return state_.plan; }
  const Bucket& bucket() const override { return state_.bucket; }
  const Kernels& kernels() const override { return *state_.backend.kernels; }
  uint64_t seed() const override { return exchange_.config_.seed; }
  uint64_t number() const override { return number_; }
  Projection projection() override { return exchange_.projection(number_, state_); }
  void all_reduce_first(Phase phase) override { all_reduce(state_.first, phase); }
  void all_reduce_second(Phase phase) override { all_reduce(state_.second, phase); }
  void average_gradient(Phase phase) override;
  Gathered all_gather_message(Phase phase) override;
  void enter(Phase phase) override;

 private:
  void begin(int64_t index);
  Mode choose_mode() const;
  void fill_payload();
  // Throws what went wrong with its place: rank, bucket, phase, first parameter.
  at::Tensor finish(c10d::ProcessGroup& group);
  void all_reduce(std::vector<at::Tensor>& payload, Phase phase);
  void count_all_reduce(int64_t bytes);
  void count_collective(int64_t wire_bytes, double link_bytes);
  at::Tensor carry();
  void start_dense();
  at::Tensor result();
  void leave();
  void publish_metrics();
  void refuse_after_failure() const;
  std::string explain(const std::string& what);

  Exchange& exchange_;
  BucketState& state_;
  c10d::ProcessGroup* group_ = nullptr;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  int64_t index_ = 0;
  uint64_t number_ = 0;
  Mode mode_ = Mode::kCompress;
  int threads_ = 0;  // the preparing thread's; a new thread would start with its own default

  std::optional<Turn> turn_;  // where the device has streams
  // The caller's, while somebody profiles: the lane's thread then shows up as well.
  std::optional<at::ThreadLocalState> profiled_;

  Span span_;
  Phase phase_ = Phase::kPrepare;
  std::chrono::steady_clock::time_point since_;
  Metrics metrics_;  // of this step, added to the exchange's at its end
};

}  // namespace arc_topk
