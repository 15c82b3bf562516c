#include "exchange/bucket_exchange.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <exception>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace arc_topk {

BucketExchange::BucketExchange(Shared& shared, BucketState& state)
    : shared_(shared), state_(state), collectives_(shared.lanes) {
  if (state.backend.streams) events_.emplace(state.backend.streams->type());
  const std::optional<double> factor = shared.config.spike_limit;
  if (factor) spike_limit_.emplace(*factor, state.device, scalar_type_of(plan().types.work()));
}

void BucketExchange::go_on_from(const BucketExchange& before) {
  if (before.spike_limit_) spike_limit_.emplace(*before.spike_limit_);
}

// --- a step, from its beginning to its end
// ----------------------------------------------------------

Mode BucketExchange::choose_mode() const {
  if (number_ < static_cast<uint64_t>(shared_.config.start_step)) return Mode::kAverage;
  if (shared_.adaptive) return mode_of_form();
  if (state_.bucket.shared != nullptr && !state_.started) return Mode::kStart;
  return plan().in_place && state_.bucket.shared == nullptr ? Mode::kAverage : Mode::kCompress;
}

void BucketExchange::begin(const at::Tensor& buffer, int64_t index, bool result_in_buffer) {
  index_ = index;
  if (state_.progress->failed) shared_.lifecycle.fail(place() + ": averaging it has failed");
  shared_.lifecycle.check_running();
  if (state_.progress->busy) {
    throw std::runtime_error(
        "arc_topk: " + place() +
        " is still being exchanged; expected its future to be waited for before "
        "the bucket is handed over again");
  }
  Streams* const queues = streams();
  if (queues != nullptr && kernels().capturing(queues->caller())) {
    throw std::runtime_error(
        "arc_topk: the current stream is capturing a CUDA graph; expected an exchange outside of "
        "it: "
        "a replay would use the same random numbers in every step");
  }
  state_.take(buffer);
  state_.bucket.result_in_gradient = result_in_buffer;
  state_.bucket.rank = shared_.rank;
  state_.progress->busy = true;
  number_ = state_.progress->exchanges;
  if (shared_.adaptive) begin_form();
  mode_ = choose_mode();
  threads_ = at::get_num_threads();
  metrics_ = {};
  since_ = std::chrono::steady_clock::now();
  profiled_.reset();
  if (at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE)) profiled_.emplace();
}

// From here on the bucket may begin its next step, or go: the last that is done with it.
void BucketExchange::end() {
  range_.end();
  state_.let_go();
  state_.progress->busy = false;
}

c10::intrusive_ptr<c10::ivalue::Future> BucketExchange::start(const at::Tensor& buffer,
                                                              int64_t index,
                                                              bool result_in_buffer) {
  begin(buffer, index, result_in_buffer);
  try {
    if (mode_ == Mode::kAverage) return average();
    if (shared_.groups.block()) shared_.lanes.start();
    prepare();
    auto future = promise();
    stage_ = Stage::kFirst;
    if (shared_.groups.block()) {
      shared_.lanes.first.submit(*this);
    } else {
      run();
    }
    return future;
  } catch (const std::exception& error) {
    future_.reset();
    end();
    fail_behind_begin(error);
  }
}

at::Tensor BucketExchange::run_here(const at::Tensor& buffer) {
  begin(buffer, 0, /*result_in_buffer=*/false);
  const auto whole = [&](void* stream) {
    state_.bucket.stream = stream;
    mode_ == Mode::kAverage ? limit_spike() : fill_payload();
    return all_stages(*shared_.groups.main, *shared_.groups.main);
  };
  try {
    Streams* const queues = streams();
    at::Tensor averaged = queues == nullptr ? whole(nullptr) : queues->here(whole);
    end();
    return averaged;
  } catch (const std::exception& error) {
    end();
    fail_behind_begin(error);
  }
}

// State may have changed, and the other ranks' step cannot be met any more: no later one may be
// taken for it.
void BucketExchange::fail_behind_begin(const std::exception& error) {
  if (shared_.lifecycle.failed()) throw;  // with its place already
  fail(error.what());
}

c10::intrusive_ptr<c10::ivalue::Future> BucketExchange::promise() {
  std::vector<c10::Device> devices;
  if (state_.backend.streams) devices.push_back(*state_.backend.streams);
  future_ = c10::make_intrusive<c10::ivalue::Future>(c10::TensorType::get(), std::move(devices));
  return future_;
}

template <class F>
auto BucketExchange::guarded(c10d::ProcessGroup* group, const F& f) {
  if (group != nullptr) {
    // After a collective has failed the groups are of no use: what still waits fails at once,
    // rather than running into its own time-out.
    const std::string before = shared_.lifecycle.failure();
    if (!before.empty()) {
      throw std::runtime_error("arc_topk: " + place() +
                               " was not exchanged, after this failure: " + before);
    }
    collectives_.begin(*group, metrics_);
  }
  since_ = std::chrono::steady_clock::now();
  try {
    return f();
  } catch (const c10::Error& error) {
    fail(error.what_without_backtrace());
  } catch (const std::exception& error) {
    fail(error.what());
  }
}

// Whoever waits for the future may let the engine go: nothing of it is touched behind its
// completion. Nor behind a submit(): another lane may have come to the end by then.
void BucketExchange::run() noexcept {
  const c10::intrusive_ptr<c10::ivalue::Future> future = future_;
  const auto complete = [&](at::Tensor averaged) {
    future_.reset();
    end();
    future->markCompleted(std::move(averaged));
  };
  try {
    std::optional<at::ThreadLocalStateGuard> profiled;
    if (shared_.groups.block() && profiled_) profiled.emplace(*profiled_);
    if (at::get_num_threads() != threads_) at::set_num_threads(threads_);
    const Groups& groups = shared_.groups;
    // With streams the lanes' groups as well: a rank without any may be among the others.
    c10d::ProcessGroup& one = groups.block() ? *groups.first : *groups.main;
    c10d::ProcessGroup& two = groups.second ? *groups.second : one;
    if (Streams* const queues = streams()) {
      const auto stages = [&](void* stream) {
        state_.bucket.stream = stream;
        return all_stages(one, two);
      };
      // The future remembers the stream that is current now: whoever waits for it waits for that.
      return queues->communicate(*events_, stages, complete);
    }
    if (!groups.block()) return complete(all_stages(one, two));
    for (;;) {
      if (stage_ == Stage::kLast) return complete(guarded(group_here(), [&] { return last(); }));
      if (stage_ == Stage::kFirst) {
        guarded(group_here(), [&] { return first(); });
        stage_ = Stage::kSecond;
      } else {
        guarded(group_here(), [&] { return second(); });
        stage_ = Stage::kLast;
      }
      if (CommThread* const lane = lane_of(stage_)) return lane->submit(*this);
    }
  } catch (const std::exception&) {
    if (future->completed()) return;
    future_.reset();
    end();
    future->setError(std::current_exception());
  }
}

CommThread* BucketExchange::lane_of(Stage stage) {
  if (stage == Stage::kLast) return must_check() ? nullptr : &shared_.lanes.last;
  return has_second() && shared_.groups.second ? &shared_.lanes.second : nullptr;
}

c10d::ProcessGroup* BucketExchange::group_here() {
  if (shared_.lanes.last.is_current()) return nullptr;
  return (shared_.lanes.second.is_current() ? shared_.groups.second : shared_.groups.first).get();
}

void BucketExchange::give_up() noexcept {
  const c10::intrusive_ptr<c10::ivalue::Future> future = std::move(future_);
  const std::string text =
      "arc_topk: " + place() + " was not exchanged: the engine was let go before its turn";
  end();
  future->setError(std::make_exception_ptr(std::runtime_error(text)));
}

void BucketExchange::settle() {
  Streams* const queues = events_ ? streams() : nullptr;
  if (queues != nullptr) queues->settle(*events_);
  const auto settle = [this](void* stream) {
    state_.bucket.stream = stream;
    if (sent_) take_scale();
    state_.compressor->settle(*this);
  };
  queues == nullptr ? settle(nullptr) : queues->here(settle);
}

// What a step has sent is in the residual no more, but if the scaler skips the step it changes
// nothing. The step before is known to be skipped once the scaler has lowered its scale.
void BucketExchange::take_scale() {
  state_.take_scale(shared_.loss_scale);
  if (sent_ && bucket().loss_scale != nullptr) state_.compressor->reclaim(*this);
}

// --- its parts
// --------------------------------------------------------------------------------------

void BucketExchange::prepare() {
  Streams* const queues = streams();
  if (queues == nullptr) return fill_payload();
  queues->use(state_.gradient[0]);
  queues->prepare(*events_, [&](void* stream) {
    state_.bucket.stream = stream;
    fill_payload();
  });
}

// Of this rank alone: nobody else need know, for only the message changes.
void BucketExchange::limit_spike() {
  const bool begun = number_ >= static_cast<uint64_t>(shared_.config.start_step);
  if (spike_limit_ && begun) spike_limit_->apply(state_.gradient[0]);
}

void BucketExchange::fill_payload() {
  enter(Phase::kPrepare);
  take_scale();
  limit_spike();
  sent_ = false;
  if (mode_ == Mode::kStart && bucket().own_a != nullptr) kernels().remember(bucket());
  if (mode_ == Mode::kCompress) state_.compressor->prepare(*this);
  if (mode_ == Mode::kDense || mode_ == Mode::kHalf) add_owed();
  if (mode_ == Mode::kHalf) {
    kernels().divide(bucket());
    if (half_.empty()) half_.push_back(at::empty_like(state_.gradient[0], at::kBFloat16));
    half_[0].copy_(state_.gradient[0]);
  }
  leave();
  if (shared_.adaptive) {
    shared_.adaptive->spent(metrics_.seconds[static_cast<int>(Phase::kPrepare)]);
  }
}

at::Tensor BucketExchange::all_stages(c10d::ProcessGroup& one, c10d::ProcessGroup& two) {
  guarded(&one, [&] { first(); });
  if (!has_second()) return guarded(&one, [&] { return last(); });
  return guarded(&two, [&] {
    second();
    return last();
  });
}

void BucketExchange::first() {
  phase_ = Phase::kFirstCollective;
  if (!task_.exchange.empty()) agree();
  if (mode_ == Mode::kCompress) {
    if (must_resync()) resync();
    state_.compressor->first(*this);
  } else if (mode_ == Mode::kHalf) {
    all_reduce(half_, Phase::kFirstCollective);
  } else {
    average_gradient(Phase::kFirstCollective);
  }
  leave();
}

bool BucketExchange::has_second() const {
  return mode_ == Mode::kCompress && state_.compressor->has_second();
}

void BucketExchange::second() {
  if (!has_second()) return;
  state_.compressor->second(*this);
  leave();
}

at::Tensor BucketExchange::last() {
  if (mode_ == Mode::kStart) start_dense();
  if (mode_ == Mode::kCompress) {
    state_.compressor->last(*this);
    ++state_.compressed;
    sent_ = bucket().feedback == FeedbackKind::kEF14 && bucket().own_a != nullptr;
    owes_ = true;
  }
  if (mode_ == Mode::kHalf) {
    enter(Phase::kApply);
    state_.gradient[0].copy_(half_[0]);
  }
  if (mode_ == Mode::kDense || mode_ == Mode::kHalf) clear_owed();
  at::Tensor averaged = result();
  if (must_check()) check(averaged);
  leave();
  if (shared_.adaptive && mode_ != Mode::kAverage) observe();
  ++state_.progress->exchanges;
  count_step();
  return averaged;
}

void BucketExchange::start_dense() {
  enter(Phase::kApply);
  state_.started = kernels().adopt(bucket());
  if (state_.started) return;
  // A mean that is not finite starts nothing: the next step is dense again, on every rank alike.
  for (at::Tensor* own : {&state_.own_a, &state_.own_b}) {
    if (own->defined()) own->zero_();
  }
}

at::Tensor BucketExchange::result() {
  const bool in_gradient = mode_ != Mode::kCompress || bucket().shared == nullptr;
  return in_gradient || kernels().publish(bucket()) ? state_.gradient[0] : state_.shared;
}

// What plain averaging costs in DDP itself, to the bit: scaled in place, then one asynchronous
// all-reduce, no thread of ours in between.
c10::intrusive_ptr<c10::ivalue::Future> BucketExchange::average() {
  const auto divide = [&](void* stream) {
    state_.bucket.stream = stream;
    limit_spike();
    kernels().divide(bucket());
  };
  Streams* const queues = streams();
  queues == nullptr ? divide(nullptr) : queues->here(divide);
  collectives_.begin(*shared_.groups.main, metrics_);
  auto future = collectives_.start_all_reduce(state_.gradient)->getFuture();
  // From here on it is torch's alone: nothing of the bucket's is in the air, so it is not busy, and
  // its step counts. (A callback would come too late for either: whoever waits may be faster.)
  ++state_.progress->exchanges;
  count_step();
  end();
  if (!future->completed()) {
    const auto done = [progress = state_.progress](c10::ivalue::Future& averaged) {
      if (averaged.hasError()) progress->failed = true;
    };
    future->addCallback(done, /*uses_future=*/false);
  }
  return future;
}

Projection BucketExchange::projection() {
  return shared_.projection.of(number_, state_, shared_.store.max_cols(), seed());
}

void BucketExchange::average_gradient(Phase phase) {
  kernels().divide(bucket());
  all_reduce(state_.gradient, phase);
}

// It is a few hundredths of the gradient: to narrow it for its way costs less than kernels that
// would write every sum in every type.
void BucketExchange::all_reduce_first(Phase phase) {
  if (state_.narrow.empty()) return all_reduce(state_.first, phase);
  if (plan().types.sends_directions()) return all_reduce(state_.narrow, phase);
  enter(phase);
  state_.narrow[0].copy_(state_.first[0]);
  collectives_.all_reduce(state_.narrow);
  state_.first[0].copy_(state_.narrow[0]);
}

void BucketExchange::all_reduce(std::vector<at::Tensor>& payload, Phase phase) {
  enter(phase);
  if (payload.empty()) return;  // tensors of no element, on every rank
  collectives_.all_reduce(payload);
}

void BucketExchange::all_gather_message(Phase phase) {
  enter(phase);
  collectives_.all_gather(state_.gathered, state_.message[0]);
}

Gathered BucketExchange::gathered() const {
  return {state_.message[0].const_data_ptr(), state_.gathered.const_data_ptr(),
          state_.message[0].numel()};
}

// --- what is told of it
// ------------------------------------------------------------------------------

std::string BucketExchange::place() const {
  return "bucket " + std::to_string(index_) + " (first parameter " +
         (state_.first_name.empty() ? "of shape " + c10::str(state_.layouts[0].sizes)
                                    : "'" + state_.first_name + "'") +
         ")";
}

void BucketExchange::fail(const std::string& what) {
  const std::string text = "arc_topk: rank " + std::to_string(shared_.rank) + ", " + place() +
                           ", phase " + name_of(phase_) + ": " + what;
  shared_.lifecycle.fail(text);
  throw std::runtime_error(text);
}

void BucketExchange::count_step() {
  metrics_.steps = number_ + 1;
  metrics_.compressed_steps = state_.compressed;
  metrics_.exchanges = 1;
  metrics_.dense_bytes = static_cast<uint64_t>(plan().dense_bytes);
  if (state_.energy.is_cpu()) {  // a device's is read when asked for
    Energy& energy = *state_.bucket.energy;
    // Compressors without a sketch have nothing to compare with, nor has a score that overflowed.
    if (energy.total > 0 && std::isfinite(energy.total)) metrics_.energy = energy;
    energy = {0, 0};
  }
  shared_.metrics.add(metrics_);
}

void BucketExchange::enter(Phase phase) {
  leave();
  phase_ = phase;
  range_.begin(kernels(), phase, index_);
}

void BucketExchange::leave() {
  const auto now = std::chrono::steady_clock::now();
  metrics_.seconds[static_cast<int>(phase_)] += std::chrono::duration<double>(now - since_).count();
  since_ = now;
  range_.end();
}

}  // namespace arc_topk
