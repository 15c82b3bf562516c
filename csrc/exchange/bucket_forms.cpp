// A bucket's steps under Config::adaptive: in which form it travels, and what it owes when that
// changes.
#include <ATen/ops/isfinite.h>

#include <chrono>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "exchange/bucket_exchange.h"

namespace arc_topk {

void BucketExchange::begin_form() {
  task_ = {};
  const auto start_step = static_cast<uint64_t>(shared_.config.start_step);
  if (number_ < start_step) return;
  if (!known_) shared_.adaptive->forget(number_);
  known_ = true;
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  task_ = shared_.adaptive->begin(static_cast<size_t>(index_), number_,
                                  std::chrono::duration<double>(now).count());
}

// What a bucket cannot do it does dense: it has nothing to compress, or is no float32. A dense one
// goes the shortest way where nobody looks and nothing can be owed. (Whether something is owed each
// rank knows for itself, and all must go the same way.)
Mode BucketExchange::mode_of_form() const {
  if (task_.form == Form::kCompressed && !plan().dense) return Mode::kCompress;
  if (task_.form == Form::kHalf && plan().types.gradient == DType::kF32) return Mode::kHalf;
  const bool over_a_lane = task_.measured || bucket().own_a != nullptr;
  return over_a_lane ? Mode::kDense : Mode::kAverage;
}

// Rare, and of torch's own operations. A gradient that may stand for none is let alone while it is
// zero: DDP throws away what a parameter gets that no rank has used.
void BucketExchange::add_owed() {
  paying_.clear();
  if (!owes_ || bucket().own_a == nullptr) return;
  state_.compressor->settle(*this);
  for (const Segment& s : plan().segments) {
    if (!s.compressed()) continue;
    at::Tensor gradient = state_.gradient[0].narrow(0, s.offset, s.numel);
    if (bucket().may_be_unused && !gradient.any().item<bool>()) continue;
    gradient.add_(state_.own_a.narrow(0, s.offset, s.numel));
    paying_.push_back(&s);
  }
}

// An element whose mean is not finite has paid nothing: it is owed still.
void BucketExchange::clear_owed() {
  if (!owes_ || bucket().own_a == nullptr) return;
  for (const Segment* s : paying_) {
    const at::Tensor paid = state_.gradient[0].narrow(0, s->offset, s->numel).isfinite();
    state_.own_a.narrow(0, s->offset, s->numel).masked_fill_(paid, 0);
  }
  owes_ = state_.own_a.any().item<bool>();
}

// The first collective waits for the last rank to come, the second for nobody.
void BucketExchange::agree() {
  const auto begun = std::chrono::steady_clock::now();
  std::vector<double> nothing{0};
  collectives_.least(nothing);
  task_.exchange[0] =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  collectives_.least(task_.exchange);
  shared_.adaptive->agree(task_.exchange);
  since_ = std::chrono::steady_clock::now();  // the bucket's own time begins here
}

void BucketExchange::observe() {
  const double cost =
      mode_ == Mode::kCompress ? state_.compressor->link_cost(bucket().world_size) : 1;
  const auto seconds = [&](Phase phase) { return metrics_.seconds[static_cast<int>(phase)]; };
  shared_.adaptive->observe(
      static_cast<size_t>(index_), task_.form,
      {seconds(Phase::kPrepare),
       seconds(Phase::kFirstCollective) + seconds(Phase::kSecondCollective),
       seconds(Phase::kSelect) + seconds(Phase::kPack) + seconds(Phase::kApply)},
      cost * static_cast<double>(metrics_.wire_bytes));
}

}  // namespace arc_topk
