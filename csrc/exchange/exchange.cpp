#include "exchange/exchange.h"

#include <algorithm>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

namespace arc_topk {
namespace {

// How long a collective in the air may take to end before it is given up: its other ranks may be
// long gone, and nobody waits for its result any more.
constexpr std::chrono::milliseconds kGrace(1000);

// A process group joins its own threads when it goes, which may wait for other ranks until its
// time-out. They do so on a thread that nobody waits for.
void let_go(c10::intrusive_ptr<c10d::ProcessGroup> group, bool waits) {
  if (!group || !waits) return;
  auto* const raw = group.release();
  const auto reap = [raw] {
    auto owned = c10::intrusive_ptr<c10d::ProcessGroup>::reclaim(raw);
    owned->abort();  // of those backends that can
  };
  try {
    std::thread(reap).detach();
  } catch (const std::system_error&) {
    // No thread is to be had: better a leak than a hang.
  }
}

}  // namespace

Shared::Shared(Config the_config, Groups the_groups)
    : config(std::move(the_config)),
      groups(std::move(the_groups)),
      rank(groups.main->getRank()),
      store(config, groups.main->getSize()) {
  if (config.adaptive) {
    adaptive.emplace(compressor_named(config.compressor).has_second() ? 2 : 1);
  }
}

Streams* Shared::streams_for(const std::optional<c10::Device>& device) {
  if (!device) return nullptr;
  if (streams == nullptr) streams = std::make_unique<Streams>(*device);
  if (streams->device() == *device) return streams.get();
  throw std::invalid_argument("arc_topk: a gradient is on device '" + device->str() +
                              "', an earlier one on '" + streams->device().str() +
                              "'; expected all of a rank's gradients on one device");
}

Exchange::Exchange(Config config, Groups groups) : shared_(std::move(config), std::move(groups)) {}

Exchange::~Exchange() { halt(); }

// --- buckets
// --------------------------------------------------------------------------------------

std::unique_lock<std::mutex> Exchange::enter() {
  std::unique_lock lock(entered_, std::try_to_lock);
  if (lock.owns_lock()) return lock;
  throw std::runtime_error(
      "arc_topk: two threads use this engine at the same time; expected one at a time");
}

BucketExchange& Exchange::exchange_of(const at::Tensor& buffer, const Parameters& parameters) {
  BucketState* state = shared_.store.find(parameters, buffer);
  const BucketState* outgrown = nullptr;
  if (state != nullptr && shared_.store.outgrown(*state)) outgrown = std::exchange(state, nullptr);
  std::unique_ptr<BucketExchange> before;
  if (state == nullptr) {
    shared_.lifecycle.check_running();
    if (shared_.store.takes_from_busy(parameters)) drain();
    // Those in the air keep what they have.
    for (auto& [old, exchange] : exchanges_) {
      if (!exchange->busy()) exchange->settle();
    }
    state = &shared_.store.make(parameters, buffer, [&](BucketState& old) {
      if (&old == outgrown) before = std::move(exchanges_[&old]);
      exchanges_.erase(&old);
    });
  }
  std::unique_ptr<BucketExchange>& exchange = exchanges_[state];
  if (exchange == nullptr) exchange = std::make_unique<BucketExchange>(shared_, *state);
  if (before != nullptr) exchange->go_on_from(*before);
  return *exchange;
}

// Buckets are about to change: nothing may be in the air that still works on the old ones. (Not so
// when DDP rebuilds its buckets: those of the step before have all ended.)
void Exchange::drain() {
  const Lifecycle::Draining draining(shared_.lifecycle);
  shared_.lanes.drain();
}

c10::intrusive_ptr<c10::ivalue::Future> Exchange::start(const at::Tensor& buffer,
                                                        const Parameters& parameters, int64_t index,
                                                        bool result_in_buffer) {
  const auto entered = enter();
  return exchange_of(buffer, parameters).start(buffer, index, result_in_buffer);
}

at::Tensor Exchange::run(const at::Tensor& buffer, const Parameters& parameters) {
  const auto entered = enter();
  return exchange_of(buffer, parameters).run_here(buffer);
}

// --- binding
// --------------------------------------------------------------------------------------

void Exchange::check_bind(const Parameters& parameters,
                          const std::vector<std::string>& names) const {
  shared_.store.check_bind(parameters, names);
}

void Exchange::bind(const Parameters& parameters, const std::vector<std::string>& names,
                    bool may_be_unused, const std::vector<double>& ratios) {
  const auto entered = enter();
  shared_.store.bind(parameters, names, may_be_unused, ratios);
}

void Exchange::set_loss_scale(at::Tensor scale) {
  const auto entered = enter();
  for (auto& [state, exchange] : exchanges_) {
    exchange->settle();
    exchange->forget_sent();  // the scales of two scalers say nothing together
  }
  shared_.loss_scale = std::move(scale);
}

void Exchange::check_idle() const {
  for (const auto& [state, exchange] : exchanges_) {
    if (!exchange->busy()) continue;
    throw std::runtime_error("arc_topk: " + exchange->place() +
                             " is still being exchanged; expected error feedback to be saved, "
                             "loaded and rescaled between two steps, behind backward()");
  }
}

void Exchange::rescale(double factor) {
  const auto entered = enter();
  shared_.lifecycle.check_running();
  settle_between_steps();
  shared_.store.rescale(factor);
}

void Exchange::stop() {
  const auto entered = enter();
  halt();
}

void Exchange::halt() noexcept {
  // From a future's callback: that is a job that runs, and those behind it cannot end meanwhile.
  const bool idle = shared_.lanes.current() == nullptr && shared_.lanes.drain(kGrace);
  shared_.lifecycle.close();
  shared_.lanes.stop();
  let_go(std::move(shared_.groups.first), !idle);
  let_go(std::move(shared_.groups.second), !idle);
}

void Exchange::resume(Groups groups, uint64_t exchanges, bool afresh) {
  const auto entered = enter();
  for (auto& [state, exchange] : exchanges_) exchange->settle();
  shared_.groups = std::move(groups);
  shared_.rank = shared_.groups.main->getRank();
  shared_.store.resume(exchanges, afresh);
  shared_.projection.forget();
  if (shared_.adaptive) shared_.adaptive->restart();
  shared_.streams.reset();
  shared_.lifecycle.open();
}

// --- checkpoints
// -----------------------------------------------------------------------------------

// The caller's stream waits for what is queued; what still needs the host is refused.
void Exchange::settle_between_steps() {
  check_idle();
  for (auto& [state, exchange] : exchanges_) exchange->settle();
}

Exchange::Saved Exchange::snapshot() {
  const auto entered = enter();
  settle_between_steps();
  const Standing standing = shared_.store.standing();
  Saved saved;
  saved.slots = shared_.store.snapshot();
  for (const uint64_t exchanges : standing.exchanges) {
    saved.exchanges = std::max(saved.exchanges, exchanges);
  }
  saved.compressed = shared_.store.compressed();
  return saved;
}

void Exchange::restore(std::vector<std::optional<Kept>> kept, uint64_t exchanges,
                       uint64_t compressed) {
  const auto entered = enter();
  settle_between_steps();
  if (shared_.adaptive) shared_.adaptive->restart();
  shared_.store.restore(std::move(kept), exchanges, compressed,
                        [this](BucketState& old) { exchanges_.erase(&old); });
}

// --- metrics
// --------------------------------------------------------------------------------------

Metrics Exchange::metrics() const {
  Metrics sum = shared_.metrics.read();
  const Energy energy = shared_.store.device_energy();
  sum.energy.captured += energy.captured;
  sum.energy.total += energy.total;
  return sum;
}

void Exchange::reset_metrics() {
  shared_.store.reset_device_energy();
  shared_.metrics.reset();
}

std::optional<Adaptive::Report> Exchange::choice() const {
  if (!shared_.adaptive) return std::nullopt;
  return shared_.adaptive->report();
}

}  // namespace arc_topk
