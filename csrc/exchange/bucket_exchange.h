// The exchange of one bucket: carries it through one step after the other, on the thread that
// prepares and then on the lanes. Made once per bucket and used again every step.
#pragma once

#include <ATen/ThreadLocalState.h>
#include <ATen/core/ivalue.h>

#include <chrono>
#include <exception>
#include <optional>
#include <string>

#include "exchange/collectives.h"
#include "exchange/shared.h"
#include "exchange/spike_limit.h"
#include "exchange/trace.h"

namespace arc_topk {

// What a step does with a bucket.
enum class Mode : uint8_t {
  kAverage,  // plain averaging: before start_step, or nothing is compressed or remembered
  kStart,    // EF21, EF21M: the dense first step, v_i = h_i = g_i, h = mean g
  kCompress,
  // Config::adaptive has chosen otherwise. What EF14 owes goes along: X_i = g_i + e_i, e_i = 0.
  kDense,
  kHalf,  // in bfloat16
};

class BucketExchange final : public Step, public CommThread::Job {
 public:
  BucketExchange(Shared& shared, BucketState& state);

  // Begins a step: prepares on the calling thread, then has the rest done. The future holds the
  // averaged bucket. `index` names the bucket in errors.
  c10::intrusive_ptr<c10::ivalue::Future> start(const at::Tensor& buffer, int64_t index,
                                                bool result_in_buffer);
  // The whole step on the calling thread and its current stream. The averaged bucket.
  at::Tensor run_here(const at::Tensor& buffer);

  bool busy() const { return state_.progress->busy; }
  // Brings the state to what it is between steps, before somebody else touches it: makes the
  // caller's stream wait for what is queued of this bucket, and gives back what a scaler's skipped
  // step has sent.
  void settle();
  void forget_sent() { sent_ = false; }
  // The same tensors' exchange before this one, whose running norm is theirs still.
  void go_on_from(const BucketExchange& before);
  std::string place() const;  // in errors

  // What comes next of a step, in the bucket's turn; in the end, the result into the future. With
  // streams and without lanes all that is left is only queued.
  void run() noexcept override;
  void give_up() noexcept override;

  const Plan& plan() const override { return state_.plan; }
  const Bucket& bucket() const override { return state_.bucket; }
  const Kernels& kernels() const override { return *state_.backend.kernels; }
  uint64_t seed() const override { return shared_.config.seed; }
  uint64_t number() const override { return number_; }
  Projection projection() override;
  void all_reduce_first(Phase phase) override;
  void all_reduce_second(Phase phase) override { all_reduce(state_.second, phase); }
  void average_gradient(Phase phase) override;
  void all_gather_message(Phase phase) override;
  Gathered gathered() const override;
  void enter(Phase phase) override;

 private:
  void begin(const at::Tensor& buffer, int64_t index, bool result_in_buffer);
  void end();
  Mode choose_mode() const;
  Streams* streams() { return shared_.streams_for(state_.backend.streams); }
  void prepare();
  void limit_spike();
  void begin_form();
  Mode mode_of_form() const;
  void add_owed();
  void clear_owed();
  void agree();
  void observe();
  void fill_payload();
  c10::intrusive_ptr<c10::ivalue::Future> average();
  c10::intrusive_ptr<c10::ivalue::Future> promise();
  // --- behind prepare(): what a lane does of a step, each behind the one before ---
  enum class Stage : uint8_t { kFirst, kSecond, kLast };
  // The lane that comes next; null: this one goes on.
  CommThread* lane_of(Stage stage);
  c10d::ProcessGroup* group_here();  // of this lane's collectives; null: it makes none
  bool has_second() const;
  void first();
  void second();
  at::Tensor last();
  // All of them here, over one group and the other: the averaged bucket.
  at::Tensor all_stages(c10d::ProcessGroup& one, c10d::ProcessGroup& two);
  // f(), of a stage with collectives over `group`. Throws what went wrong with its place: rank,
  // bucket, phase, first parameter.
  template <class F>
  auto guarded(c10d::ProcessGroup* group, const F& f);
  void start_dense();
  at::Tensor result();
  // Throws where this step has left ranks with other rows or another result. A collective.
  void check(const at::Tensor& averaged);
  bool must_check() const;
  // Sets h to the mean of the h_i, from which it drifts by what the wire's sums round. A
  // collective.
  void resync();
  bool must_resync() const;
  void all_reduce(std::vector<at::Tensor>& payload, Phase phase);
  void leave();
  void count_step();
  void take_scale();
  [[noreturn]] void fail(const std::string& what);
  [[noreturn]] void fail_behind_begin(const std::exception& error);

  Shared& shared_;
  BucketState& state_;
  Collectives collectives_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  Stage stage_ = Stage::kFirst;
  int64_t index_ = 0;
  uint64_t number_ = 0;
  Mode mode_ = Mode::kCompress;
  bool known_ = false;                  // to Shared::adaptive
  Adaptive::Task task_;                 // of this step
  bool owes_ = true;                    // own_a may have something in it that is not averaged yet
  std::vector<const Segment*> paying_;  // what they owe goes along in this step
  std::vector<at::Tensor> half_;        // the bucket in bfloat16
  bool sent_ = false;  // the step before has ended, and has sent what its residual then was without
  int threads_ = 0;    // the preparing thread's; a new thread would start with its own default

  std::optional<SpikeLimit> spike_limit_;
  std::optional<BucketEvents> events_;  // where the device has streams
  // The caller's, while somebody profiles: lanes then show up as well.
  std::optional<at::ThreadLocalState> profiled_;

  TraceRange range_;
  Phase phase_ = Phase::kPrepare;
  std::chrono::steady_clock::time_point since_;
  Metrics metrics_;  // of this step, added to the engine's at its end
};

}  // namespace arc_topk
