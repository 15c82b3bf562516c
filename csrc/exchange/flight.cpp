#include "exchange/flight.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace arc_topk {

Mode Flight::choose_mode() const {
  const Config& config = exchange_.config_;
  if (number_ < static_cast<uint64_t>(config.start_step)) return Mode::kAverage;
  if (state_.bucket.shared != nullptr && !state_.started) return Mode::kStart;
  return plan().in_place && state_.bucket.shared == nullptr ? Mode::kAverage : Mode::kCompress;
}

Flight::Flight(Exchange& exchange, BucketState& state) : exchange_(exchange), state_(state) {
  if (state.backend.streams) turn_.emplace(state.backend.streams->type());
}

void Flight::begin(int64_t index) {
  index_ = index;
  number_ = state_.exchanges++;
  mode_ = choose_mode();
  threads_ = at::get_num_threads();
  metrics_ = {};
  since_ = std::chrono::steady_clock::now();
  profiled_.reset();
  if (at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE)) profiled_.emplace();
}

void Flight::prepare(int64_t index) {
  begin(index);
  if (mode_ == Mode::kAverage) return;
  Streams* streams = exchange_.streams_of(state_);
  if (streams == nullptr) return fill_payload();
  streams->use(state_.gradient[0]);
  streams->prepare(*turn_, [&](void* stream) {
    state_.bucket.stream = stream;
    fill_payload();
  });
}

void Flight::fill_payload() {
  enter(Phase::kPrepare);
  if (mode_ == Mode::kStart && bucket().own_a != nullptr) kernels().remember(bucket());
  if (mode_ == Mode::kCompress) state_.compressor->prepare(*this);
  leave();
}

at::Tensor Flight::finish(c10d::ProcessGroup& group) {
  refuse_after_failure();
  group_ = &group;
  since_ = std::chrono::steady_clock::now();
  phase_ = Phase::kFirstCollective;
  try {
    at::Tensor averaged = carry();
    leave();
    publish_metrics();
    return averaged;
  } catch (const c10::Error& error) {
    throw std::runtime_error(explain(error.what_without_backtrace()));
  } catch (const std::exception& error) {
    throw std::runtime_error(explain(error.what()));
  }
}

at::Tensor Flight::carry() {
  switch (mode_) {
    case Mode::kAverage:
      average_gradient(Phase::kFirstCollective);
      break;
    case Mode::kStart:
      start_dense();
      break;
    case Mode::kCompress:
      state_.compressor->exchange(*this);
      ++state_.compressed;
      break;
  }
  return result();
}

void Flight::start_dense() {
  average_gradient(Phase::kFirstCollective);
  enter(Phase::kApply);
  state_.started = kernels().adopt(bucket());
  if (state_.started) return;
  // A mean that is not finite starts nothing: the next step is dense again, on every rank alike.
  for (at::Tensor* own : {&state_.own_a, &state_.own_b}) {
    if (own->defined()) own->zero_();
  }
}

at::Tensor Flight::result() {
  const bool in_gradient = mode_ != Mode::kCompress || bucket().shared == nullptr;
  return in_gradient || kernels().publish(bucket()) ? state_.gradient[0] : state_.shared;
}

void Flight::run() noexcept {
  const c10::intrusive_ptr<c10::ivalue::Future> future = std::move(future_);
  const bool on_lane = exchange_.lane_group_ != nullptr;
  try {
    std::optional<at::ThreadLocalStateGuard> profiled;
    if (on_lane && profiled_) profiled.emplace(*profiled_);
    if (at::get_num_threads() != threads_) at::set_num_threads(threads_);
    c10d::ProcessGroup& group = on_lane ? *exchange_.lane_group_ : *exchange_.group_;
    Streams* streams = exchange_.streams_of(state_);
    if (streams == nullptr) return future->markCompleted(finish(group));
    const auto rest = [&](void* stream) {
      state_.bucket.stream = stream;
      return finish(group);
    };
    // The future remembers the stream that is current now: whoever waits for it waits for that.
    streams->communicate(*turn_, rest,
                         [&](at::Tensor averaged) { future->markCompleted(std::move(averaged)); });
  } catch (const std::exception&) {
    if (!future->completed()) future->setError(std::current_exception());
  }
}

at::Tensor Flight::run_here(c10d::ProcessGroup& group) {
  begin(0);
  const auto whole = [&](void* stream) {
    state_.bucket.stream = stream;
    if (mode_ != Mode::kAverage) fill_payload();
    return finish(group);
  };
  Streams* streams = exchange_.streams_of(state_);
  return streams == nullptr ? whole(nullptr) : streams->here(whole);
}

// After a collective has failed the group is of no use: what still waits fails at once, rather than
// running into its own time-out.
void Flight::refuse_after_failure() const {
  const std::lock_guard lock(exchange_.mutex_);
  if (exchange_.failure_.empty()) return;
  throw std::runtime_error("arc_topk: " + exchange_.describe(state_, index_) +
                           " was not exchanged, after this failure: " + exchange_.failure_);
}

std::string Flight::explain(const std::string& what) {
  const std::lock_guard lock(exchange_.mutex_);
  exchange_.failure_ = "arc_topk: rank " + std::to_string(exchange_.rank_) + ", " +
                       exchange_.describe(state_, index_) + ", phase " + name_of(phase_) + ": " +
                       what;
  return exchange_.failure_;
}

c10::intrusive_ptr<c10::ivalue::Future> Flight::promise() {
  std::vector<c10::Device> devices;
  if (state_.backend.streams) devices.push_back(*state_.backend.streams);
  future_ = c10::make_intrusive<c10::ivalue::Future>(c10::TensorType::get(), std::move(devices));
  return future_;
}

// What plain averaging costs in DDP itself, to the bit: scaled in place, then one asynchronous
// all-reduce, no thread of ours in between.
c10::intrusive_ptr<c10::ivalue::Future> Flight::average(c10d::ProcessGroup& group) {
  std::vector<at::Tensor>& gradient = state_.gradient;
  const auto divide = [&](void* stream) {
    state_.bucket.stream = stream;
    kernels().divide(bucket());
  };
  Streams* streams = exchange_.streams_of(state_);
  streams == nullptr ? divide(nullptr) : streams->here(divide);
  const auto bytes = static_cast<int64_t>(gradient[0].nbytes());
  auto future = group.allreduce(gradient)->getFuture();

  count_all_reduce(bytes);
  publish_metrics();
  return future;
}

void Flight::average_gradient(Phase phase) {
  kernels().divide(bucket());
  all_reduce(state_.gradient, phase);
}

void Flight::all_reduce(std::vector<at::Tensor>& payload, Phase phase) {
  enter(phase);
  count_all_reduce(static_cast<int64_t>(payload[0].nbytes()));
  group_->allreduce(payload)->wait();
}

Gathered Flight::all_gather_message(Phase phase) {
  enter(phase);
  const int64_t bytes = state_.message[0].numel();
  count_collective(bytes,
                   static_cast<double>(exchange_.world_size_ - 1) * static_cast<double>(bytes));
  group_->allgather(state_.gathered_parts, state_.message)->wait();
  return {state_.message[0].const_data_ptr(), state_.gathered.const_data_ptr(), bytes};
}

// Ring algorithms: every byte goes around once to be summed and once to be told, less a rank's own.
void Flight::count_all_reduce(int64_t bytes) {
  const double n = exchange_.world_size_;
  count_collective(bytes, 2 * (n - 1) / n * static_cast<double>(bytes));
}

void Flight::count_collective(int64_t wire_bytes, double link_bytes) {
  metrics_.collectives += 1;
  metrics_.wire_bytes += static_cast<uint64_t>(wire_bytes);
  metrics_.link_bytes += link_bytes;
}

void Flight::publish_metrics() {
  const std::lock_guard lock(exchange_.mutex_);
  Metrics& sum = exchange_.metrics_;
  sum.steps = std::max(sum.steps, state_.exchanges);
  sum.compressed_steps = std::max(sum.compressed_steps, state_.compressed);
  sum.exchanges += 1;
  sum.collectives += metrics_.collectives;
  sum.wire_bytes += metrics_.wire_bytes;
  sum.link_bytes += metrics_.link_bytes;
  sum.dense_bytes += static_cast<uint64_t>(plan().dense_bytes);
  if (state_.energy.is_cpu()) {
    Energy& energy = *state_.bucket.energy;
    if (energy.total > 0) {  // compressors without a sketch have nothing to compare with
      sum.energy.captured += energy.captured;
      sum.energy.total += energy.total;
    }
    energy = {0, 0};
  }
  for (int i = 0; i < kNumPhases; ++i) sum.seconds[i] += metrics_.seconds[i];
}

void Flight::enter(Phase phase) {
  leave();
  phase_ = phase;
  span_.begin(kernels(), phase, index_);
}

void Flight::leave() {
  const auto now = std::chrono::steady_clock::now();
  metrics_.seconds[static_cast<int>(phase_)] += std::chrono::duration<double>(now - since_).count();
  since_ = now;
  span_.end();
}

}  // namespace arc_topk
