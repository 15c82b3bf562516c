#include "state/state_store.h"

#include <ATen/ops/where.h>

#include <algorithm>
#include <stdexcept>
#include <unordered_set>
#include <utility>

#include "compress/make_plan.h"
#include "compress/warmup.h"
#include "state/pages.h"

namespace arc_topk {
namespace {

std::string quoted(const std::string& name) { return name.empty() ? name : "'" + name + "' "; }

std::string text_of(at::IntArrayRef sizes) { return c10::str(sizes); }

// One tensor's part of an arena, as it lies there.
at::Tensor part_of(const at::Tensor& arena, int64_t offset, const Layout& layout) {
  return arena.as_strided(layout.sizes, layout.strides, offset);
}

// What is in it is not used any more, though it is not freed yet.
void forget_all(const at::Tensor& memory) {
  if (memory.defined() && memory.is_cpu()) forget(memory.mutable_data_ptr(), memory.nbytes());
}

// Values of one tensor from one arena into another. DDP's first step has all tensors in one bucket:
// if what has moved stayed where it was, all error feedback would be there twice.
void carry(const at::Tensor& to, int64_t to_offset, const Layout& to_layout, const at::Tensor& from,
           int64_t from_offset, const Layout& from_layout) {
  if (!to.defined() || !from.defined()) return;
  const bool alike = to_layout.strides == from_layout.strides;
  if (!alike) {
    part_of(to, to_offset, to_layout).copy_(part_of(from, from_offset, from_layout));
  }
  in_parts(c10::multiply_integers(from_layout.sizes), [&](int64_t offset, int64_t count) {
    const at::Tensor old = from.narrow(0, from_offset + offset, count);
    if (alike) to.narrow(0, to_offset + offset, count).copy_(old);
    forget_all(old);
  });
}

// Low rank's W^T of one tensor, [k, n], as it lies in its bucket; undefined: it has none.
at::Tensor basis_of(const BucketState& bucket, size_t index) {
  const Segment& s = bucket.plan.segments[index];
  if (!bucket.basis.defined() || !s.compressed()) return {};
  return bucket.basis.as_strided({s.kept, s.cols}, {factor_stride(s.cols), 1},
                                 bucket.plan.factors[index].right);
}

// As many columns of W as there are in both; those of another length are drawn anew.
void carry_basis(const at::Tensor& to, const at::Tensor& from) {
  if (!to.defined() || !from.defined() || to.size(1) != from.size(1)) return;
  const int64_t columns = std::min(to.size(0), from.size(0));
  to.narrow(0, 0, columns).copy_(from.narrow(0, 0, columns));
}

// Of a bucket that makes no step any more, for values have left it.
void forget_payloads(const BucketState& bucket) {
  for (const auto* payload : {&bucket.first, &bucket.narrow, &bucket.second, &bucket.message}) {
    for (const at::Tensor& memory : *payload) forget_all(memory);
  }
  forget_all(bucket.gathered);
}

// Puts the first element of h in its place where NaN stands for it in `old`: see
// Kernels::publish().
void give_back(const at::Tensor& h, int64_t here, int64_t numel, const BucketState& old,
               int64_t there) {
  if (!h.defined() || !old.withheld.defined() || numel == 0) return;
  at::Tensor first = h.narrow(0, here, 1);
  first.copy_(at::where(old.is_withheld.narrow(0, there, 1).to(first.device()),
                        old.withheld.narrow(0, there, 1).to(first.options()), first));
}

}  // namespace

StateStore::StateStore(Config config, int world_size)
    : config_(std::move(config)),
      compressor_(compressor_named(config_.compressor)),
      world_size_(world_size) {}

// --- slots
// ----------------------------------------------------------------------------------------

const StateStore::Slot* StateStore::slot_of(const at::Tensor& parameter) const {
  const auto place = places_.find(parameter.unsafeGetTensorImpl());
  return place == places_.end() ? nullptr : &slots_[place->second];
}

size_t StateStore::slot_for(const at::Tensor& parameter) {
  const auto [place, is_new] = places_.try_emplace(parameter.unsafeGetTensorImpl(), slots_.size());
  if (is_new) {
    slots_.push_back({"", c10::weak_intrusive_ptr<c10::TensorImpl>(parameter.getIntrusivePtr())});
  }
  return place->second;
}

std::vector<StateStore::Slot> StateStore::rebound(const Parameters& parameters,
                                                  const std::vector<std::string>& names) const {
  std::unordered_map<std::string, const Slot*> by_name;
  for (const Slot& slot : slots_) {
    if (!slot.name.empty()) by_name.emplace(slot.name, &slot);
  }
  std::vector<Slot> slots;
  std::unordered_set<const Slot*> taken;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& parameter = parameters[i];
    Slot slot{names[i], c10::weak_intrusive_ptr<c10::TensorImpl>(parameter.getIntrusivePtr())};
    const auto named = by_name.find(names[i]);
    const Slot* old = named != by_name.end() ? named->second : slot_of(parameter);
    if (old != nullptr && old->has_state()) {
      if (parameter.sizes() != old->sizes()) {
        throw std::invalid_argument(
            "arc_topk: parameter '" + names[i] + "' has shape " + text_of(parameter.sizes()) +
            ", but its error feedback is of shape " + text_of(old->sizes()) +
            "; expected the same shape: make a new State for another model");
      }
      slot.bucket = old->bucket;
      slot.index = old->index;
      slot.kept = old->kept;
      taken.insert(old);
    }
    slots.push_back(std::move(slot));
  }
  const auto left = std::find_if(slots_.begin(), slots_.end(), [&](const Slot& old) {
    return old.has_state() && taken.count(&old) == 0;
  });
  if (left == slots_.end()) return slots;
  throw std::invalid_argument(
      "arc_topk: there is error feedback of parameter " +
      (left->name.empty() ? "of shape " + text_of(left->sizes()) + " that has no name"
                          : "'" + left->name + "'") +
      ", which the model to bind to does not have; expected the model that the state was used "
      "with: "
      "make a new State for another one");
}

at::IntArrayRef StateStore::Slot::sizes() const {
  if (bucket != nullptr) return bucket->layouts[index].sizes;
  return kept->own_a.defined() ? kept->own_a.sizes() : kept->shared.sizes();
}

bool StateStore::Slot::has_residual() const {
  if (bucket == nullptr) return kept && kept->own_a.defined();
  return bucket->own_a.defined() && bucket->plan.segments[index].compressed();
}

void StateStore::check_bind(const Parameters& parameters,
                            const std::vector<std::string>& names) const {
  rebound(parameters, names);
}

void StateStore::bind(const Parameters& parameters, const std::vector<std::string>& names,
                      bool may_be_unused, const std::vector<double>& ratios) {
  slots_ = rebound(parameters, names);
  for (size_t i = 0; i < ratios.size(); ++i) slots_.at(i).ratio = ratios[i];
  places_.clear();
  for (size_t i = 0; i < parameters.size(); ++i) {
    places_.emplace(parameters[i].unsafeGetTensorImpl(), i);
  }
  bound_ = true;
  may_be_unused_ = may_be_unused;
  for (auto& [bucket, owned] : buckets_) owned.retired = true;
}

Standing StateStore::standing() const {
  Standing standing;
  for (const Slot& slot : slots_) {
    standing.exchanges.push_back(slot.bucket == nullptr ? first_exchange_
                                                        : slot.bucket->progress->exchanges.load());
    standing.started.push_back(slot.bucket != nullptr ? slot.bucket->started
                                                      : slot.kept && slot.kept->started);
  }
  return standing;
}

uint64_t StateStore::compressed() const {
  uint64_t most = first_compressed_;
  for (const auto& [bucket, owned] : buckets_) most = std::max(most, bucket->compressed);
  return most;
}

void StateStore::resume(uint64_t exchanges, bool afresh) {
  first_exchange_ = exchanges;
  for (auto& [bucket, owned] : buckets_) {
    owned.state->progress->exchanges = exchanges;
    if (afresh) owned.state->started = false;
  }
  for (Slot& slot : slots_) {
    if (afresh && slot.kept) slot.kept->started = false;
  }
}

// --- checkpoints
// ----------------------------------------------------------------------------------

Kept StateStore::copy_of(const Slot& slot) const {
  const BucketState& bucket = *slot.bucket;
  const Segment& segment = bucket.plan.segments[slot.index];
  const auto copy = [&](const at::Tensor& arena) {
    if (!arena.defined()) return at::Tensor();
    return part_of(arena, segment.offset, bucket.layouts[slot.index])
        .to(c10::kCPU, arena.scalar_type(), /*non_blocking=*/false, /*copy=*/true)
        .contiguous();
  };
  Kept kept;
  kept.started = bucket.started;
  const at::Tensor basis = basis_of(bucket, slot.index);
  if (basis.defined()) {
    kept.basis =
        basis.to(c10::kCPU, at::kFloat, /*non_blocking=*/false, /*copy=*/true).contiguous();
  }
  if (segment.compressed()) {
    kept.own_a = copy(bucket.own_a);
    kept.own_b = copy(bucket.own_b);
  }
  if (segment.compressed() || has_momentum(config_.feedback)) kept.shared = copy(bucket.shared);
  give_back(kept.shared.defined() ? kept.shared.view(-1) : at::Tensor(), 0, segment.numel, bucket,
            static_cast<int64_t>(slot.index));
  return kept;
}

std::vector<std::pair<std::string, std::optional<Kept>>> StateStore::snapshot() const {
  std::vector<std::pair<std::string, std::optional<Kept>>> all;
  for (const Slot& slot : slots_) {
    std::optional<Kept> kept = slot.kept;
    if (slot.bucket != nullptr) kept = copy_of(slot);
    const bool empty =
        kept && !kept->own_a.defined() && !kept->shared.defined() && !kept->basis.defined();
    all.emplace_back(slot.name, empty ? std::nullopt : std::move(kept));
  }
  return all;
}

void StateStore::restore(std::vector<std::optional<Kept>> kept, uint64_t exchanges,
                         uint64_t compressed, const std::function<void(BucketState&)>& leaving) {
  const std::lock_guard lock(mutex_);
  for (auto& [bucket, owned] : buckets_) leaving(*owned.state);
  buckets_.clear();
  for (size_t i = 0; i < slots_.size(); ++i) {
    slots_[i].bucket = nullptr;
    slots_[i].kept = std::move(kept.at(i));
  }
  first_exchange_ = exchanges;
  first_compressed_ = compressed;
}

// --- buckets
// --------------------------------------------------------------------------------------

BucketState* StateStore::find(const Parameters& parameters, const at::Tensor& buffer) const {
  const Slot* first = parameters.empty() ? nullptr : slot_of(parameters.front());
  if (first == nullptr || first->bucket == nullptr) return nullptr;
  BucketState* bucket = first->bucket;
  const Owned& owned = buckets_.at(bucket);
  if (owned.retired || owned.tensors.size() != parameters.size() ||
      owned.tenants != static_cast<int64_t>(parameters.size()) ||
      bucket->plan.numel != buffer.numel() || bucket->device != buffer.device() ||
      scalar_type_of(bucket->plan.types.gradient) != buffer.scalar_type() ||
      !buffer.is_contiguous()) {
    return nullptr;
  }
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (owned.tensors[i] != parameters[i].unsafeGetTensorImpl()) return nullptr;
    if (!lies_as(bucket->layouts[i], buffer, parameters[i])) return nullptr;
  }
  return bucket;
}

bool StateStore::outgrown(const BucketState& bucket) const {
  const Progress& now = *bucket.progress;
  // Of those that are busy or have failed a step is refused: by the bucket that knows it.
  return !now.busy && !now.failed && warmup_stage(config_, now.exchanges) != bucket.stage;
}

bool StateStore::takes_from_busy(const Parameters& parameters) const {
  return std::any_of(parameters.begin(), parameters.end(), [&](const at::Tensor& parameter) {
    const Slot* slot = slot_of(parameter);
    return slot != nullptr && slot->bucket != nullptr && slot->bucket->progress->busy;
  });
}

void StateStore::check(const Parameters& parameters, const std::vector<Layout>& layouts,
                       const at::Tensor& buffer) const {
  int64_t numel = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Slot* slot = slot_of(parameters[i]);
    const std::string which = "arc_topk: parameter " + quoted(slot == nullptr ? "" : slot->name) +
                              "of shape " + text_of(layouts[i].sizes);
    if (slot == nullptr && bound_) {
      throw std::invalid_argument(which +
                                  " is not one of the model that this state was bound to last; "
                                  "expected its parameters only: bind the state to this model");
    }
    if (slot != nullptr && slot->has_state() &&
        slot->sizes() != at::IntArrayRef(layouts[i].sizes)) {
      throw std::invalid_argument(which + " had shape " + text_of(slot->sizes()) +
                                  " before; expected a shape that stays: its error feedback "
                                  "cannot be carried over, make a new State");
    }
    numel += c10::multiply_integers(layouts[i].sizes);
  }
  if (parameters.empty() || buffer.numel() != numel || !buffer.is_contiguous()) {
    throw std::invalid_argument(
        "arc_topk: the bucket has " + std::to_string(buffer.numel()) + " elements, but its " +
        std::to_string(parameters.size()) + " parameters have " + std::to_string(numel) +
        "; expected one contiguous buffer with one gradient after the other");
  }
}

BucketState& StateStore::make(const Parameters& parameters, const at::Tensor& buffer,
                              const std::function<void(BucketState&)>& leaving) {
  std::vector<Layout> layouts;
  for (const at::Tensor& parameter : parameters) layouts.push_back(layout_in(buffer, parameter));
  check(parameters, layouts, buffer);

  const Slot* const first = slot_of(parameters.front());
  const BucketState* const before = first == nullptr ? nullptr : first->bucket;
  const uint64_t exchanges =
      before == nullptr ? first_exchange_ : before->progress->exchanges.load();
  const uint64_t compressed = before == nullptr ? first_compressed_ : before->compressed;
  const int64_t stage = warmup_stage(config_, exchanges);
  std::vector<Shape> shapes;
  size_t fresh = slots_.size();
  for (size_t i = 0; i < parameters.size(); ++i) {
    shapes.push_back(shape_of(layouts[i].sizes, layouts[i].strides));
    const auto place = places_.find(parameters[i].unsafeGetTensorImpl());
    const bool known = place != places_.end();
    shapes[i].stream = static_cast<uint32_t>(known ? place->second : fresh++);
    const std::optional<double> own = known ? slots_[place->second].ratio : std::nullopt;
    shapes[i].ratio = ratio_in_stage(config_, own.value_or(config_.ratio), stage);
  }
  Owned made{
      make_bucket_state(config_, compressor_, world_size_, layouts, shapes, buffer, may_be_unused_),
      {}};
  BucketState& bucket = *made.state;
  bucket.stage = stage;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Slot* slot = slot_of(parameters[i]);
    if (slot != nullptr && slot->has_residual() && !bucket.plan.segments[i].compressed()) {
      throw std::invalid_argument("arc_topk: parameter " + quoted(slot->name) +
                                  "was compressed and, with gradients of dtype " +
                                  c10::toString(buffer.scalar_type()) + " and ratio " +
                                  std::to_string(*shapes[i].ratio) +
                                  ", is not worth it any more; expected both such that it stays "
                                  "compressed: its error feedback would be lost, make a new State");
    }
  }

  const std::lock_guard lock(mutex_);
  made.tenants = static_cast<int64_t>(parameters.size());
  bucket.progress->exchanges = exchanges;
  bucket.compressed = compressed;
  bucket.started = true;
  for (size_t i = 0; i < parameters.size(); ++i) {
    made.tensors.push_back(parameters[i].unsafeGetTensorImpl());
    Slot& slot = slots_[slot_for(parameters[i])];
    // A dense step starts all of them again where one of them has not started: nothing is lost by
    // it.
    const bool started = move(slot, bucket, i);
    const bool has_estimate =
        bucket.plan.segments[i].compressed() || has_momentum(config_.feedback);
    if (has_estimate) bucket.started = bucket.started && started;
    if (i == 0) bucket.first_name = slot.name;
    leave(slot, bucket, leaving);
    slot.kept.reset();
    slot.bucket = &bucket;
    slot.index = i;
  }
  max_cols_ = std::max(max_cols_, bucket.plan.max_cols);
  buckets_.emplace(&bucket, std::move(made));
  return bucket;
}

bool StateStore::move(const Slot& slot, BucketState& to, size_t index) const {
  const int64_t here = to.plan.segments[index].offset;
  // A tensor that was dense has no own state: EF14 owes nothing, and EF21 begins with a dense step
  // again. Under EF21M it has an h, the mean of what would be v_i: as v_i and h_i of every rank it
  // leaves all means as they are.
  const bool begins = to.plan.segments[index].compressed() && !slot.has_residual();
  const auto begin = [&] {
    if (!begins || !shares_estimate(config_.feedback)) return true;
    if (!has_momentum(config_.feedback)) return false;
    const Layout& layout = to.layouts[index];
    part_of(to.own_b, here, layout).copy_(part_of(to.shared, here, layout));
    return true;
  };
  if (slot.kept) {
    const auto put = [&](const at::Tensor& arena, const at::Tensor& value) {
      if (arena.defined() && value.defined()) part_of(arena, here, to.layouts[index]).copy_(value);
    };
    put(to.own_a, slot.kept->own_a);
    put(to.own_b, slot.kept->own_b);
    put(to.shared, slot.kept->shared);
    carry_basis(basis_of(to, index), slot.kept->basis);
    return begin() && slot.kept->started;
  }
  if (slot.bucket == nullptr) return false;
  const BucketState& old = *slot.bucket;
  const int64_t there = old.plan.segments[slot.index].offset;
  const Layout& here_as = to.layouts[index];
  const Layout& there_as = old.layouts[slot.index];
  if (!begins) {  // else nobody has kept up what lies there
    carry(to.own_a, here, here_as, old.own_a, there, there_as);
    carry(to.own_b, here, here_as, old.own_b, there, there_as);
  }
  carry(to.shared, here, here_as, old.shared, there, there_as);
  carry_basis(basis_of(to, index), basis_of(old, slot.index));
  give_back(to.shared, here, to.plan.segments[index].numel, old, static_cast<int64_t>(slot.index));
  return begin() && old.started;
}

void StateStore::leave(const Slot& slot, BucketState& successor,
                       const std::function<void(BucketState&)>& leaving) {
  if (slot.bucket == nullptr) return;
  const auto old = buckets_.find(slot.bucket);
  if (--old->second.tenants > 0) return forget_payloads(*slot.bucket);
  successor.energy.add_(old->second.state->energy.to(successor.energy.device()));
  leaving(*old->second.state);
  buckets_.erase(old);
}

void StateStore::rescale(double factor) {
  for (auto& [bucket, owned] : buckets_) {
    BucketState& state = *owned.state;
    for (at::Tensor* values : {&state.own_a, &state.own_b, &state.shared, &state.withheld}) {
      if (values->defined()) values->mul_(factor);
    }
  }
  for (Slot& slot : slots_) {
    if (!slot.kept) continue;
    for (at::Tensor* values : {&slot.kept->own_a, &slot.kept->own_b, &slot.kept->shared}) {
      if (values->defined()) *values = values->mul(factor);  // whose they are is not known
    }
  }
}

// --- energy
// ---------------------------------------------------------------------------------------

Energy StateStore::device_energy() const {
  std::vector<at::Tensor> sums;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [bucket, owned] : buckets_) {
      // Those of the CPU are counted as its steps end.
      if (!bucket->energy.is_cpu()) sums.push_back(bucket->energy);
    }
  }
  Energy sum{0, 0};
  for (const at::Tensor& there : sums) {
    const at::Tensor here = there.cpu();
    const auto* energy = static_cast<const Energy*>(here.const_data_ptr());
    sum.captured += energy->captured;
    sum.total += energy->total;
  }
  return sum;
}

void StateStore::reset_device_energy() {
  const std::lock_guard lock(mutex_);
  for (auto& [bucket, owned] : buckets_) {
    if (!bucket->energy.is_cpu()) owned.state->energy.zero_();
  }
}

}  // namespace arc_topk
