#include "state/bucket_state.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/reciprocal.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "compress/make_plan.h"
#include "state/pages.h"

namespace arc_topk {
namespace {

at::Tensor uninitialised(int64_t numel, at::ScalarType type, c10::Device device) {
  if (numel == 0) return {};
  at::Tensor memory = at::empty({numel}, at::TensorOptions().dtype(type).device(device));
  if (device.is_cpu()) ask_for_huge_pages(memory.mutable_data_ptr(), memory.nbytes());
  return memory;
}

void* data_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}
void* data_of(const std::vector<at::Tensor>& one) {
  return one.empty() ? nullptr : data_of(one[0]);
}

// On the CPU their pages come when they are first written: what moves in from other buckets is not
// there twice at any time.
at::Tensor zeros(int64_t numel, at::ScalarType type, c10::Device device) {
  const at::Tensor memory = uninitialised(numel, type, device);
  if (!memory.defined()) return at::empty({0}, at::TensorOptions().dtype(type).device(device));
  if (!device.is_cpu()) return memory.zero_();
  in_parts(numel, [&](int64_t offset, int64_t count) {
    const at::Tensor part = memory.narrow(0, offset, count).zero_();
    forget(part.mutable_data_ptr(), part.nbytes());
  });
  return memory;
}

// A vector of one tensor, or none.
std::vector<at::Tensor> one_of(at::Tensor tensor) {
  std::vector<at::Tensor> one;
  if (tensor.defined()) one.push_back(std::move(tensor));
  return one;
}

// A copy of a table in the device's memory, for kernels to read.
template <class T>
const T* upload(const std::vector<T>& table, at::Tensor& copy, c10::Device device) {
  if (device.is_cpu()) return table.data();
  const auto bytes = static_cast<int64_t>(table.size() * sizeof(T));
  copy = at::from_blob(const_cast<T*>(table.data()), {bytes}, at::kByte).to(device);
  return static_cast<const T*>(copy.const_data_ptr());
}

void allocate_arenas(BucketState& s, FeedbackKind feedback, c10::Device device) {
  const auto arena = [&] {
    return zeros(s.plan.numel, scalar_type_of(s.plan.types.state), device);
  };
  if (!s.plan.dense && own_states(feedback) > 0) s.own_a = arena();
  if (!s.plan.dense && own_states(feedback) > 1) s.own_b = arena();
  // A dense tensor's estimate is the mean itself, or under EF21M the momentum of it.
  const bool is_mean = s.plan.in_place && !has_momentum(feedback);
  if (shares_estimate(feedback) && !is_mean) s.shared = arena();
}

void allocate_factors(BucketState& s, c10::Device device) {
  const Plan& plan = s.plan;
  if (plan.num_left == 0) return;
  const at::ScalarType work = scalar_type_of(plan.types.work());
  s.left = zeros(plan.num_left, work, device);
  if (s.own_a.defined()) s.right = zeros(plan.num_right, work, device);
  s.basis = zeros(plan.num_right, at::kFloat, device);
  s.partial = zeros(plan.num_partial, work, device);
  s.tiles = cut_into_tiles(plan.segments, s.backend.kernels->grain());
  int64_t most_columns = 0;
  for (const Segment& segment : plan.segments) most_columns = std::max(most_columns, segment.kept);
  s.bucket.factors = {data_of(s.left),
                      data_of(s.right),
                      static_cast<float*>(data_of(s.basis)),
                      data_of(s.partial),
                      upload(plan.factors, s.place_table, device),
                      upload(s.tiles, s.tile_table, device),
                      static_cast<int64_t>(s.tiles.size()),
                      plan.num_left,
                      most_columns};
}

void allocate_payloads(BucketState& s, c10::Device device) {
  const Plan& plan = s.plan;
  s.first = one_of(uninitialised(plan.first_numel, scalar_type_of(plan.types.work()), device));
  if (plan.types.sketch != plan.types.work()) {
    const bool directions = plan.types.sends_directions();
    s.narrow = one_of(uninitialised(directions ? plan.direction_bytes : plan.first_numel,
                                    scalar_type_of(plan.types.sketch), device));
    if (directions) s.bucket.directions = static_cast<uint8_t*>(data_of(s.narrow));
  }
  s.second = one_of(uninitialised(plan.second_numel, scalar_type_of(plan.types.wire), device));
  // Zeros: those of a tensor that has not been sent yet are compared between ranks as well.
  s.picks = zeros(plan.num_picks, at::kInt, device);

  s.bucket.first = data_of(s.first);
  s.bucket.second = data_of(s.second);
  s.bucket.picks = static_cast<int32_t*>(data_of(s.picks));
  const bool directions = plan.types.sends_directions();
  const DType flag_type = directions            ? DType::kU8
                          : plan.flags_in_first ? plan.types.work()
                                                : plan.types.wire;
  void* flags_payload = directions            ? s.bucket.directions
                        : plan.flags_in_first ? s.bucket.first
                                              : s.bucket.second;
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
  s.marks = zeros(3 * segments, at::kByte, device);
  s.energy = zeros(2, at::kDouble, device);
  auto* marks = static_cast<uint8_t*>(data_of(s.marks));
  s.bucket.used = marks;
  s.bucket.bad = marks + segments;
  s.bucket.outcome = reinterpret_cast<Outcome*>(marks + 2 * segments);
  s.bucket.energy = static_cast<Energy*>(data_of(s.energy));
  if (s.shared.defined() && s.backend.streams) {
    s.withheld = zeros(segments, s.shared.scalar_type(), device);
    s.is_withheld = zeros(segments, at::kBool, device);
    s.bucket.withheld = data_of(s.withheld);
    s.bucket.is_withheld = static_cast<uint8_t*>(data_of(s.is_withheld));
  }
  s.scratch = zeros(s.backend.kernels->scratch_bytes(s.bucket), at::kByte, device);
  s.bucket.scratch = data_of(s.scratch);
}

// All that kernels are told but for where things lie.
void describe(BucketState& s, const Config& config, int world_size) {
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
  b.feedback = config.feedback;
  b.eta = config.eta;
  b.sketch_dim = s.compressor->sketches() ? config.sketch_dim : 0;
  b.world_size = world_size;
  b.wire_scale = s.compressor->gathers() ? 1.0 : scale_of_sum(world_size);
}

void check_servable(const Compressor& compressor, const Kernels& kernels, c10::Device device) {
  if (!compressor.factorises() || kernels.low_rank() != nullptr) return;
  throw std::invalid_argument(std::string("arc_topk: compressor '") + compressor.name() +
                              "' has no kernels for device '" + device.str() +
                              "' yet; expected gradients on the CPU, or compressor 'arc_topk'");
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

}  // namespace

std::unique_ptr<BucketState> make_bucket_state(const Config& config, const Compressor& compressor,
                                               int world_size, std::vector<Layout> layouts,
                                               const std::vector<Shape>& shapes,
                                               const at::Tensor& buffer, bool may_be_unused) {
  // Memory that outlives an inference_mode in which it may be first needed: torch's own operations
  // could not write to it later.
  const c10::InferenceMode off(false);
  auto s = std::make_unique<BucketState>();
  const c10::Device device = buffer.device();
  s->backend = backend_for(device);
  s->device = device;
  s->layouts = std::move(layouts);
  s->plan = make_plan(config, compressor, dtype_of(buffer.scalar_type()), shapes, world_size);
  s->pieces = cut_into_pieces(s->plan.segments, s->backend.kernels->grain());
  s->compressor = s->plan.dense ? &dense() : &compressor;
  check_servable(compressor, *s->backend.kernels, device);
  s->gradient.resize(1);
  describe(*s, config, world_size);
  s->bucket.may_be_unused = may_be_unused;

  allocate_arenas(*s, config.feedback, device);
  allocate_factors(*s, device);
  if (s->compressor->gathers()) {
    allocate_message(*s, world_size, device);
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

void BucketState::take(const at::Tensor& buffer) {
  if (backend.streams) check_alignment(buffer);
  gradient[0] = buffer;
  bucket.gradient = buffer.mutable_data_ptr();
}

void BucketState::let_go() {
  gradient[0].reset();
  bucket.gradient = nullptr;
}

void BucketState::take_scale(const at::Tensor& scale) {
  if (!scale.defined()) {
    bucket.loss_scale = bucket.scale_before = nullptr;
    return;
  }
  if (bucket.loss_scale == nullptr) {
    for (Scale& its : scales) {
      its.both = zeros(2, at::kDouble, device);
      its.up = its.both.select(0, 0);
      its.down = its.both.select(0, 1);
    }
  }
  std::swap(scales[0], scales[1]);
  scales[0].up.copy_(scale);
  at::reciprocal_out(scales[0].down, scales[0].up);
  bucket.loss_scale = scales[0].both.const_data_ptr<double>();
  bucket.scale_before = scales[1].both.const_data_ptr<double>();
}

}  // namespace arc_topk
