#include "on_device.h"

#include <ATen/ops/empty.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace arc_topk::testing {
namespace {

constexpr int64_t kAlign = 256;   // as cudaMalloc's
constexpr int64_t kMargin = 256;  // of ones, before and behind every stretch
constexpr int kOnes = 0xFF;

// How much a bucket's pointers point to.
struct Extent {
  explicit Extent(const Bucket& b) {
    for (int64_t i = 0; i < b.num_segments; ++i) {
      const Segment& s = b.segments[i];
      if (s.compressed()) {
        first = std::max(first, s.sketch + s.rows * b.sketch_dim);
        if (b.wire_type == DType::kU8) first = std::max(first, s.units(b.sketch_dim) + s.rows);
        second = std::max(second, s.packed + s.kept * s.cols);
        flags = std::max(flags, s.flag + 1);
        picks = std::max(picks, s.pick + s.kept);
      } else {
        int64_t& numel = s.dense_in_first ? first : second;
        numel = std::max(numel, s.packed + s.numel);
      }
    }
  }
  int64_t first = 0, second = 0, flags = 0, picks = 0;
};

// f(pointer, bytes) for all of a bucket's.
template <class F>
void for_arrays(Bucket& b, const Extent& n, int64_t scratch_bytes, const F& f) {
  const auto numel = [](int64_t count, DType type) { return count * size_of(type); };
  const auto table = []<class T>(int64_t count, const T*) {
    return count * static_cast<int64_t>(sizeof(T));
  };
  const DType work = work_type(b.gradient_type);
  f(b.segments, table(b.num_segments, b.segments));
  f(b.pieces, table(b.num_pieces, b.pieces));
  f(b.gradient, numel(b.numel, b.gradient_type));
  f(b.own_a, numel(b.numel, b.state_type));
  f(b.own_b, numel(b.numel, b.state_type));
  f(b.shared, numel(b.numel, b.state_type));
  f(b.first, numel(n.first, work));
  f(b.second, numel(n.second, b.wire_type));
  f(b.flags, numel(n.flags, b.flag_type));
  f(b.picks, table(n.picks, b.picks));
  f(b.energy, table(1, b.energy));
  f(b.used, table(b.num_segments, b.used));
  f(b.bad, table(b.num_segments, b.bad));
  f(b.outcome, table(b.num_segments, b.outcome));
  f(b.scratch, scratch_bytes);
  f(b.withheld, numel(b.num_segments, b.state_type));
  f(b.is_withheld, table(b.num_segments, b.is_withheld));
  f(b.loss_scale, table(2, b.loss_scale));
  f(b.scale_before, table(2, b.scale_before));
}

}  // namespace

// --- Twin
// -----------------------------------------------------------------------------------------

void Twin::add(const void* at, int64_t bytes) {
  if (at == nullptr || bytes <= 0) return;
  stretches_.push_back({static_cast<char*>(const_cast<void*>(at)), bytes, 0});
}

void Twin::merge() {
  std::sort(stretches_.begin(), stretches_.end(),
            [](const Stretch& a, const Stretch& b) { return a.host < b.host; });
  std::vector<Stretch> merged;
  for (const Stretch& s : stretches_) {
    if (!merged.empty() && s.host < merged.back().host + merged.back().bytes) {
      Stretch& last = merged.back();
      last.bytes = std::max(last.bytes, s.host + s.bytes - last.host);
    } else {
      merged.push_back(s);
    }
  }
  stretches_ = std::move(merged);
}

// Places for all stretches behind an address; returns the bytes needed.
int64_t Twin::lay_out(uintptr_t base) {
  int64_t end = 0;
  for (Stretch& s : stretches_) {
    const int64_t begin = end + kMargin;
    const uintptr_t shift = reinterpret_cast<uintptr_t>(s.host) - (base + begin);
    s.offset = begin + static_cast<int64_t>(shift % kAlign);
    end = s.offset + s.bytes;
  }
  return end + kMargin;
}

void Twin::go() {
  merge();
  const int64_t enough = lay_out(0) + kAlign * (1 + static_cast<int64_t>(stretches_.size()));
  staging_ = at::empty({enough}, at::kByte);
  // The host's other memory is the staging: then copy_() of it onto itself does nothing.
  memory_ = device_.is_cpu() ? staging_
                             : at::empty({enough}, at::TensorOptions(at::kByte).device(device_));
  lay_out(reinterpret_cast<uintptr_t>(memory_.data_ptr()));
  auto* staging = static_cast<char*>(staging_.data_ptr());
  std::memset(staging, kOnes, static_cast<size_t>(enough));
  for (const Stretch& s : stretches_) {
    std::memcpy(staging + s.offset, s.host, static_cast<size_t>(s.bytes));
    std::memset(s.host, kOnes, static_cast<size_t>(s.bytes));
  }
  memory_.copy_(staging_);
}

void Twin::come_back() {
  staging_.copy_(memory_);
  const auto* staging = static_cast<const char*>(staging_.data_ptr());
  // All of it before anything is checked: the bucket must be whole again where that throws.
  for (const Stretch& s : stretches_)
    std::memcpy(s.host, staging + s.offset, static_cast<size_t>(s.bytes));
  int64_t end = 0;
  for (const Stretch& s : stretches_) {
    expect_ones(end, s.offset);
    end = s.offset + s.bytes;
  }
  expect_ones(end, staging_.numel());
}

void Twin::expect_ones(int64_t begin, int64_t end) const {
  const auto* bytes = static_cast<const unsigned char*>(staging_.data_ptr());
  if (std::all_of(bytes + begin, bytes + end, [](unsigned char x) { return x == kOnes; })) return;
  throw std::logic_error("written outside of what the bucket points to");
}

const void* Twin::find(const void* at) const {
  if (at == nullptr) return nullptr;
  for (const Stretch& s : stretches_) {
    const int64_t offset = static_cast<const char*>(at) - s.host;
    if (offset >= 0 && offset < s.bytes)
      return static_cast<const char*>(memory_.data_ptr()) + s.offset + offset;
  }
  return nullptr;
}

// --- OnDevice
// -------------------------------------------------------------------------------------

OnDevice::OnDevice(const Kernels& inner, c10::Device device) : inner_(inner), device_(device) {
  if (device.is_cpu()) return;
  const c10::impl::VirtualGuardImpl guard(device.type());
  if (guard.deviceCount() == 0) throw std::runtime_error("torch finds no GPU");
  stream_ = guard.getStreamFromGlobalPool(device);
}

void OnDevice::run(Twin& twin, const Bucket& b, const Work& work) const {
  std::optional<c10::StreamGuard> current;
  if (stream_) current.emplace(*stream_);
  Bucket there = b;
  const Extent extent(b);
  const int64_t scratch = b.scratch != nullptr ? scratch_bytes(b) : 0;
  for_arrays(there, extent, scratch, [&](auto* at, int64_t bytes) { twin.add(at, bytes); });
  twin.go();
  for_arrays(there, extent, scratch, [&](auto*& at, int64_t) { at = twin.there(at); });
  there.stream = stream_ ? stream_->native_handle() : nullptr;
  work(there);
  twin.come_back();
}

void OnDevice::run(const Bucket& b, const Work& work) const {
  Twin twin(device_);
  run(twin, b, work);
}

void OnDevice::run_gathered(const Bucket& b, const Gathered* gathered,
                            const std::function<void(const Bucket&, const Gathered*)>& work) const {
  if (gathered == nullptr) return run(b, [&](const Bucket& there) { work(there, nullptr); });
  Twin twin(device_);
  twin.add(gathered->own, gathered->stride);
  twin.add(gathered->data, gathered->stride * b.world_size);
  run(twin, b, [&](const Bucket& there) {
    const Gathered messages{twin.there(gathered->own), twin.there(gathered->data),
                            gathered->stride};
    work(there, &messages);
  });
}

void OnDevice::project(const Bucket& b, float* data, int64_t stride, int64_t begin, int64_t end,
                       uint64_t seed, uint64_t step) const {
  Twin twin(device_);
  twin.add(data, b.sketch_dim * stride * static_cast<int64_t>(sizeof(float)));
  run(twin, b, [&](const Bucket& there) {
    inner_.project(there, twin.there(data), stride, begin, end, seed, step);
  });
}

void OnDevice::reclaim(const Bucket& b) const {
  run(b, [&](const Bucket& there) { inner_.reclaim(there); });
}
void OnDevice::prepare(const Bucket& b, const Projection* v) const {
  Twin twin(device_);
  if (v != nullptr)
    twin.add(v->data, b.sketch_dim * v->stride * static_cast<int64_t>(sizeof(float)));
  run(twin, b, [&](const Bucket& there) {
    const Projection its = v != nullptr ? Projection{twin.there(v->data), v->stride} : Projection{};
    inner_.prepare(there, v != nullptr ? &its : nullptr);
  });
}

void OnDevice::select(const Bucket& b, const Keys& keys) const {
  run(b, [&](const Bucket& there) { inner_.select(there, keys); });
}
void OnDevice::pack(const Bucket& b) const {
  run(b, [&](const Bucket& there) { inner_.pack(there); });
}
void OnDevice::commit(const Bucket& b, const Gathered* gathered) const {
  run_gathered(b, gathered, [&](const Bucket& there, const Gathered* messages) {
    inner_.commit(there, messages);
  });
}
void OnDevice::pack_and_commit(const Bucket& b) const {
  run(b, [&](const Bucket& there) { inner_.pack_and_commit(there); });
}
void OnDevice::apply(const Bucket& b, const Gathered* gathered) const {
  run_gathered(b, gathered, [&](const Bucket& there, const Gathered* messages) {
    inner_.apply(there, messages);
  });
}
bool OnDevice::publish(const Bucket& b) const {
  bool answer = false;
  run(b, [&](const Bucket& there) { answer = inner_.publish(there); });
  return answer;
}
void OnDevice::divide(const Bucket& b) const {
  run(b, [&](const Bucket& there) { inner_.divide(there); });
}
void OnDevice::remember(const Bucket& b) const {
  run(b, [&](const Bucket& there) { inner_.remember(there); });
}
bool OnDevice::adopt(const Bucket& b) const {
  bool answer = false;
  run(b, [&](const Bucket& there) { answer = inner_.adopt(there); });
  return answer;
}
void OnDevice::blend(const Bucket& b) const {
  run(b, [&](const Bucket& there) { inner_.blend(there); });
}

}  // namespace arc_topk::testing
