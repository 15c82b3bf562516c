#include "exchange/state.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace arc_topk {
namespace {

at::Tensor uninitialised(int64_t numel, at::ScalarType type, c10::Device device) {
  return numel == 0 ? at::Tensor()
                    : at::empty({numel}, at::TensorOptions().dtype(type).device(device));
}

void* data_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}
void* data_of(const std::vector<at::Tensor>& one) {
  return one.empty() ? nullptr : data_of(one[0]);
}

// A vector of one tensor, or none.
std::vector<at::Tensor> one_of(at::Tensor tensor) {
  std::vector<at::Tensor> one;
  if (tensor.defined()) one.push_back(std::move(tensor));
  return one;
}

// fp16 overflows at 65504: the sum of N values does not when each was scaled down by the next power
// of two from N on. A power of two, since that loses nothing but the smallest subnormal numbers,
// and what is lost stays in the error feedback. What is gathered is not summed on the wire.
double wire_scale(DType wire, const Compressor& compressor, int world_size) {
  const bool may_overflow = wire == DType::kF16 && !compressor.gathers();
  return may_overflow ? std::exp2(-std::ceil(std::log2(world_size))) : 1.0;
}

void allocate_arenas(BucketState& s, FeedbackKind feedback, c10::Device device) {
  const auto zeros = [&] {
    return at::zeros({s.plan.numel},
                     at::TensorOptions().dtype(scalar_type_of(s.plan.types.state)).device(device));
  };
  if (!s.plan.dense && own_states(feedback) > 0) s.own_a = zeros();
  if (!s.plan.dense && own_states(feedback) > 1) s.own_b = zeros();
  // A dense tensor's estimate is the mean itself, or under EF21M the momentum of it.
  const bool is_mean = s.plan.in_place && feedback != FeedbackKind::kEF21M;
  if (shares_estimate(feedback) && !is_mean) s.shared = zeros();
}

void allocate_payloads(BucketState& s, c10::Device device) {
  const Plan& plan = s.plan;
  s.first = one_of(uninitialised(plan.first_numel, scalar_type_of(plan.types.work()), device));
  s.second = one_of(uninitialised(plan.second_numel, scalar_type_of(plan.types.wire), device));
  s.picks = uninitialised(plan.num_picks, at::kInt, device);

  s.bucket.first = data_of(s.first);
  s.bucket.second = data_of(s.second);
  s.bucket.picks = static_cast<int32_t*>(data_of(s.picks));
  const DType flag_type = plan.flags_in_first ? plan.types.work() : plan.types.wire;
  void* flags_payload = plan.flags_in_first ? s.bucket.first : s.bucket.second;
  s.bucket.flag_type = flag_type;
  s.bucket.flags = static_cast<char*>(flags_payload) + plan.flags_at * size_of(flag_type);
}

// Top-K's one message of bytes, with everything in it; csrc/compress/top_k.cpp draws it.
void allocate_message(BucketState& s, int world_size, c10::Device device) {
  const Plan& plan = s.plan;
  const int64_t dense = plan.first_numel * size_of(plan.types.work());
  const int64_t values = plan.second_numel * size_of(plan.types.wire);
  const int64_t picks = plan.num_picks * static_cast<int64_t>(sizeof(int32_t));
  const int64_t flags = plan.num_flags * static_cast<int64_t>(sizeof(float));
  const int64_t bytes = dense + values + picks + flags;
  const bool values_early = size_of(plan.types.wire) == 8;

  s.message = one_of(uninitialised(bytes, at::kByte, device));
  s.gathered = uninitialised(bytes * world_size, at::kByte, device);
  s.gathered_parts.resize(1);
  for (int rank = 0; rank < world_size; ++rank) {
    s.gathered_parts[0].push_back(s.gathered.narrow(0, rank * bytes, bytes));
  }

  char* at = static_cast<char*>(data_of(s.message));
  if (values_early) s.bucket.second = std::exchange(at, at + values);
  s.bucket.first = std::exchange(at, at + dense);
  s.bucket.picks = reinterpret_cast<int32_t*>(std::exchange(at, at + picks));
  s.bucket.flags = std::exchange(at, at + flags);
  if (!values_early) s.bucket.second = at;
  s.bucket.flag_type = DType::kF32;
}

void allocate_scratch(BucketState& s, c10::Device device) {
  const auto segments = static_cast<int64_t>(s.plan.segments.size());
  const auto zeros = [&](int64_t numel, at::ScalarType type) {
    return at::zeros({numel}, at::TensorOptions().dtype(type).device(device));
  };
  s.marks = zeros(3 * segments, at::kByte);
  s.energy = zeros(2, at::kDouble);
  auto* marks = static_cast<uint8_t*>(data_of(s.marks));
  s.bucket.used = marks;
  s.bucket.bad = marks + segments;
  s.bucket.outcome = reinterpret_cast<Outcome*>(marks + 2 * segments);
  s.bucket.energy = static_cast<Energy*>(data_of(s.energy));
  if (s.shared.defined() && s.backend.streams) {
    s.withheld = zeros(segments, s.shared.scalar_type());
    s.is_withheld = zeros(segments, at::kBool);
    s.bucket.withheld = data_of(s.withheld);
    s.bucket.is_withheld = static_cast<uint8_t*>(data_of(s.is_withheld));
  }
  s.scratch = zeros(s.backend.kernels->scratch_bytes(s.bucket), at::kByte);
  s.bucket.scratch = data_of(s.scratch);
}

// A copy of a table in the device's memory, for kernels to read.
template <class T>
const T* upload(const std::vector<T>& table, at::Tensor& copy, c10::Device device) {
  if (device.is_cpu()) return table.data();
  const auto bytes = static_cast<int64_t>(table.size() * sizeof(T));
  copy = at::from_blob(const_cast<T*>(table.data()), {bytes}, at::kByte).to(device);
  return static_cast<const T*>(copy.const_data_ptr());
}

// What the allocator gives is; a view into something larger may not be.
void check_alignment(const at::Tensor& buffer) {
  constexpr uintptr_t kBytes = 16;  // of one load
  if (reinterpret_cast<uintptr_t>(buffer.const_data_ptr()) % kBytes == 0) return;
  throw std::invalid_argument("arc_topk: the bucket's buffer begins at element " +
                              std::to_string(buffer.storage_offset()) +
                              " of its storage; expected an address that is a multiple of " +
                              std::to_string(kBytes) + " bytes: copy it into a tensor of its own");
}

// Puts the first element of h in its place where NaN stands for it in `old`: see
// Kernels::publish().
void give_back(at::Tensor& h, const Segment& here, const BucketState& old, int64_t there) {
  if (!h.defined() || !old.withheld.defined() || here.numel == 0) return;
  at::Tensor first = h.narrow(0, here.offset, 1);
  first.copy_(
      at::where(old.is_withheld.narrow(0, there, 1), old.withheld.narrow(0, there, 1), first));
}

void check(const at::Tensor& buffer, const std::vector<at::Tensor>& parameters,
           int64_t plan_numel) {
  if (buffer.numel() == plan_numel && buffer.is_contiguous()) return;
  throw std::invalid_argument("arc_topk: the bucket has " + std::to_string(buffer.numel()) +
                              " elements, but its " + std::to_string(parameters.size()) +
                              " parameters have " + std::to_string(plan_numel) +
                              "; expected one contiguous buffer with one gradient after the other");
}

}  // namespace

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kF32;
    case at::kDouble:
      return DType::kF64;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    default:
      throw std::invalid_argument(std::string("arc_topk: a gradient has dtype ") +
                                  c10::toString(type) +
                                  "; expected Float, Double, BFloat16 or Half");
  }
}

at::ScalarType scalar_type_of(DType type) {
  switch (type) {
    case DType::kF32:
      return at::kFloat;
    case DType::kF64:
      return at::kDouble;
    case DType::kBF16:
      return at::kBFloat16;
    case DType::kF16:
      return at::kHalf;
  }
  throw std::invalid_argument("unknown DType");
}

Shape shape_of(at::IntArrayRef sizes, at::IntArrayRef strides) {
  Shape shape{1, static_cast<int64_t>(sizes.size()), 1, 0};
  int64_t slowest = -1;
  for (size_t d = 0; d < sizes.size(); ++d) {
    shape.numel *= sizes[d];
    if (strides[d] > slowest) {
      slowest = strides[d];
      shape.rows = sizes[d];
    }
  }
  return shape;
}

StateStore::StateStore(Config config, int world_size)
    : config_(std::move(config)),
      compressor_(compressor_named(config_.compressor)),
      world_size_(world_size) {}
StateStore::~StateStore() = default;

BucketState* StateStore::known(const std::vector<at::Tensor>& parameters) const {
  const auto place = places_.find(parameters.front().unsafeGetTensorImpl());
  if (place == places_.end()) return nullptr;
  BucketState* bucket = place->second.bucket;
  if (bucket->parameters.size() != parameters.size()) return nullptr;
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!bucket->parameters[i].is_same(parameters[i])) return nullptr;
  }
  return bucket;
}

BucketState& StateStore::bucket_for(const std::vector<at::Tensor>& parameters,
                                    const at::Tensor& buffer) {
  BucketState* bucket = known(parameters);
  if (bucket == nullptr) {
    std::unique_ptr<BucketState> made = make(parameters, buffer);
    bucket = made.get();
    buckets_.emplace(bucket, std::move(made));
    move_in(*bucket);
  }
  if (bucket->gradient.empty() || !bucket->gradient[0].is_same(buffer)) {
    if (bucket->backend.streams) check_alignment(buffer);
    bucket->gradient.assign(1, buffer);
  }
  bucket->bucket.gradient = buffer.mutable_data_ptr();
  return *bucket;
}

std::unique_ptr<BucketState> StateStore::make(const std::vector<at::Tensor>& parameters,
                                              const at::Tensor& buffer) {
  std::vector<Shape> shapes;
  for (const at::Tensor& parameter : parameters) {
    Shape shape = shape_of(parameter.sizes(), parameter.strides());
    const auto place = places_.find(parameter.unsafeGetTensorImpl());
    const size_t fresh = places_.size() + shapes.size();
    shape.stream = place != places_.end() ? place->second.stream : static_cast<uint32_t>(fresh);
    shapes.push_back(shape);
  }

  auto s = std::make_unique<BucketState>();
  const c10::Device device = buffer.device();
  s->backend = backend_for(device);
  s->parameters = parameters;
  s->plan = make_plan(config_, compressor_, dtype_of(buffer.scalar_type()), shapes, world_size_);
  s->pieces = cut_into_pieces(s->plan.segments, s->backend.kernels->grain());
  s->compressor = s->plan.dense ? &dense() : &compressor_;
  check(buffer, parameters, s->plan.numel);
  describe(*s);

  allocate_arenas(*s, config_.feedback, device);
  if (s->compressor->gathers()) {
    allocate_message(*s, world_size_, device);
  } else {
    allocate_payloads(*s, device);
  }
  allocate_scratch(*s, device);
  s->bucket.own_a = data_of(s->own_a);
  s->bucket.own_b = data_of(s->own_b);
  s->bucket.shared = data_of(s->shared);
  s->bucket.segments = upload(s->plan.segments, s->segment_table, device);
  s->bucket.pieces = upload(s->pieces, s->piece_table, device);
  return s;
}

// All that kernels are told but for where things lie.
void StateStore::describe(BucketState& s) const {
  Bucket& b = s.bucket;
  b.segments = s.plan.segments.data();
  b.num_segments = static_cast<int64_t>(s.plan.segments.size());
  b.num_dense = std::count_if(s.plan.segments.begin(), s.plan.segments.end(),
                              [](const Segment& segment) { return !segment.compressed(); });
  b.num_large = s.plan.num_large;
  b.pieces = s.pieces.data();
  b.num_pieces = static_cast<int64_t>(s.pieces.size());
  b.splits_rows = splits_rows(s.pieces, s.plan.segments);
  b.numel = s.plan.numel;
  b.gradient_type = s.plan.types.gradient;
  b.state_type = s.plan.types.state;
  b.wire_type = s.plan.types.wire;
  b.feedback = config_.feedback;
  b.eta = config_.eta;
  b.sketch_dim = s.compressor->sketches() ? config_.sketch_dim : 0;
  b.world_size = world_size_;
  b.wire_scale = wire_scale(b.wire_type, *s.compressor, world_size_);
}

Energy StateStore::device_energy() const {
  Energy sum{0, 0};
  for (const auto& [bucket, owned] : buckets_) {
    if (bucket->energy.is_cpu()) continue;  // its steps are counted as they end
    const at::Tensor here = bucket->energy.cpu();
    const auto* energy = static_cast<const Energy*>(here.const_data_ptr());
    sum.captured += energy->captured;
    sum.total += energy->total;
  }
  return sum;
}

void StateStore::reset_device_energy() {
  for (auto& [bucket, owned] : buckets_) {
    if (!owned->energy.is_cpu()) owned->energy.zero_();
  }
}

void StateStore::move_in(BucketState& bucket) {
  const auto carry = [](at::Tensor& to, int64_t to_offset, const at::Tensor& from,
                        int64_t from_offset, int64_t numel) {
    if (to.defined() && from.defined()) {
      to.narrow(0, to_offset, numel).copy_(from.narrow(0, from_offset, numel));
    }
  };
  bucket.started = true;
  for (size_t i = 0; i < bucket.parameters.size(); ++i) {
    const Segment& here = bucket.plan.segments[i];
    bool started = false;
    const auto [place, is_new] = places_.try_emplace(bucket.parameters[i].unsafeGetTensorImpl());
    if (!is_new) {
      BucketState& old = *place->second.bucket;
      const int64_t there = old.plan.segments[place->second.index].offset;
      carry(bucket.own_a, here.offset, old.own_a, there, here.numel);
      carry(bucket.own_b, here.offset, old.own_b, there, here.numel);
      carry(bucket.shared, here.offset, old.shared, there, here.numel);
      give_back(bucket.shared, here, old, place->second.index);
      if (i == 0) {
        bucket.exchanges = old.exchanges;
        bucket.compressed = old.compressed;
      }
      started = old.started;
      if (--old.parameters_here == 0) {
        bucket.energy.add_(old.energy);
        buckets_.erase(&old);
      }
    }
    // A dense step starts all of them again where one of them has not started: nothing is lost by
    // it.
    const bool has_estimate = here.compressed() || config_.feedback == FeedbackKind::kEF21M;
    if (has_estimate) bucket.started = bucket.started && started;
    place->second = {&bucket, static_cast<int64_t>(i), here.stream};
    ++bucket.parameters_here;
  }
  max_cols_ = std::max(max_cols_, bucket.plan.max_cols);
}

}  // namespace arc_topk
