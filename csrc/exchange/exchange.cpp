#include "exchange/exchange.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "exchange/flight.h"

namespace arc_topk {
namespace {

// The distance between the columns of V, in floats. They are read side by side, four at a time: a
// distance of a power of two would put the same rows of all of them in the same few cache sets. A
// quarter of 4096 bytes and a cache line apart, they and what they are multiplied with do not meet.
int64_t column_stride(int64_t rows) {
  constexpr int64_t kPage = 1024;
  constexpr int64_t kApart = kPage / 4 + 16;
  return (rows + kPage - kApart - 1) / kPage * kPage + kApart;
}

}  // namespace

Exchange::Exchange(Config config, c10::intrusive_ptr<c10d::ProcessGroup> group,
                   c10::intrusive_ptr<c10d::ProcessGroup> lane_group)
    : config_(std::move(config)),
      group_(std::move(group)),
      lane_group_(std::move(lane_group)),
      rank_(group_->getRank()),
      world_size_(group_->getSize()),
      store_(config_, world_size_) {}

Exchange::~Exchange() = default;

Flight& Exchange::flight_of(const at::Tensor& buffer, const std::vector<at::Tensor>& parameters) {
  BucketState& state = store_.bucket_for(parameters, buffer);
  if (state.step == nullptr) state.step = std::make_unique<Flight>(*this, state);
  return static_cast<Flight&>(*state.step);
}

Streams* Exchange::streams_of(const BucketState& state) {
  const std::optional<c10::Device> device = state.backend.streams;
  if (!device) return nullptr;
  if (streams_ == nullptr) streams_ = std::make_unique<Streams>(*device);
  if (streams_->device() == *device) return streams_.get();
  throw std::invalid_argument("arc_topk: a gradient is on device '" + device->str() +
                              "', an earlier one on '" + streams_->device().str() +
                              "'; expected all of a rank's gradients on one device");
}

c10::intrusive_ptr<c10::ivalue::Future> Exchange::start(const at::Tensor& buffer,
                                                        const std::vector<at::Tensor>& parameters,
                                                        int64_t index) {
  Flight& flight = flight_of(buffer, parameters);
  flight.prepare(index);
  if (flight.only_averages()) return flight.average(*group_);
  auto future = flight.promise();
  if (lane_group_ == nullptr) {
    flight.run();
  } else {
    lane_.submit(flight);
  }
  return future;
}

at::Tensor Exchange::run(const at::Tensor& buffer, const std::vector<at::Tensor>& parameters) {
  return flight_of(buffer, parameters).run_here(*group_);
}

// One V a step, of which a matrix with n columns uses the first n rows: made as far as the widest
// matrix so far needs it, by whichever bucket comes first.
Projection Exchange::projection(uint64_t step, const BucketState& state) {
  const int64_t needed = store_.max_cols();
  const int64_t r = config_.sketch_dim;
  if (!v_.defined() || v_.size(1) < needed) {
    v_ = at::empty({r, column_stride(needed)},
                   at::TensorOptions().dtype(at::kFloat).device(state.gradient[0].device()));
    v_rows_ = 0;
  }
  if (v_step_ != step) v_rows_ = 0;
  v_step_ = step;
  const int64_t stride = v_.size(1);
  auto* data = static_cast<float*>(v_.mutable_data_ptr());
  if (v_rows_ < needed) {
    state.backend.kernels->project(state.bucket, data, stride, v_rows_, needed, config_.seed, step);
    v_rows_ = needed;
  }
  return {data, stride};
}

void Exchange::set_name(const at::Tensor& parameter, std::string name) {
  const std::lock_guard lock(mutex_);  // the lane reads names when it describes a failure
  names_[parameter.unsafeGetTensorImpl()] = std::move(name);
}

std::string Exchange::describe(const BucketState& state, int64_t index) const {
  const at::Tensor& first = state.parameters.front();
  const auto name = names_.find(first.unsafeGetTensorImpl());
  std::string text = "bucket " + std::to_string(index) + " (first parameter ";
  if (name != names_.end()) {
    text += "'" + name->second + "'";
  } else {
    text += "of shape " + c10::str(first.sizes());
  }
  return text + ")";
}

Metrics Exchange::metrics() const {
  const Energy energy = store_.device_energy();
  const std::lock_guard lock(mutex_);
  Metrics sum = metrics_;
  sum.energy.captured += energy.captured;
  sum.energy.total += energy.total;
  return sum;
}

void Exchange::reset_metrics() {
  store_.reset_device_energy();
  const std::lock_guard lock(mutex_);
  const uint64_t steps = metrics_.steps;
  const uint64_t compressed_steps = metrics_.compressed_steps;
  metrics_ = {};
  metrics_.steps = steps;
  metrics_.compressed_steps = compressed_steps;
}

}  // namespace arc_topk
