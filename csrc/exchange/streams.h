// How buckets are queued on a device that works asynchronously (CUDA): nothing here waits on the
// host. One stream prepares, another communicates, and events order them, so that a bucket's
// prepare runs beside the collectives of the one before it, and both beside the backward pass.
//
// Written over c10's generic streams: no CUDA header, and a recording fake can stand in for them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <utility>

namespace arc_topk {

// The events of one bucket, used again every step.
struct BucketEvents {
  explicit BucketEvents(c10::DeviceType type) : ready(type), prepared(type), done(type) {}
  c10::Event ready;     // the gradient is there
  c10::Event prepared;  // the first payload is filled
  c10::Event done;      // the step's last kernel has run: payloads and state are free again
};

class Streams {
 public:
  explicit Streams(c10::Device device)
      : device_(device),
        guard_(device.type()),
        prepare_(guard_.getStreamFromGlobalPool(device, /*isHighPriority=*/true)),
        communicate_(guard_.getStreamFromGlobalPool(device, /*isHighPriority=*/true)) {}

  c10::Device device() const { return device_; }

  // f(stream) with the prepare stream current, behind all that the caller's stream holds and behind
  // the bucket's step before.
  template <class F>
  void prepare(BucketEvents& events, F&& f) {
    events.ready.record(guard_.getStream(device_));
    const c10::StreamGuard current(prepare_);
    events.ready.block(prepare_);
    events.done.block(prepare_);  // of no effect before its first record
    f(prepare_.native_handle());
    events.prepared.record(prepare_);
  }

  // complete(f(stream)) with the communicate stream current, behind the bucket's prepare and all
  // buckets that communicated before.
  template <class F, class Complete>
  void communicate(BucketEvents& events, F&& f, Complete&& complete) {
    const c10::StreamGuard current(communicate_);
    events.prepared.block(communicate_);
    auto value = f(communicate_.native_handle());
    events.done.record(communicate_);  // before anybody can begin the bucket's next step
    complete(std::move(value));
  }

  // The caller's stream, as kernels are told it.
  void* caller() { return guard_.getStream(device_).native_handle(); }

  // The caller's stream waits for the bucket's last step.
  void settle(BucketEvents& events) { events.done.block(guard_.getStream(device_)); }

  // f(stream) with the caller's stream of this device, which need not be the current device.
  template <class F>
  auto here(F&& f) {
    const c10::StreamGuard current(guard_.getStream(device_));
    return f(guard_.getStream(device_).native_handle());
  }

  // Tells the allocator that memory of the caller's is used on these streams as well: it is not
  // given to anybody else before they are through with it.
  void use(const at::Tensor& tensor) {
    guard_.recordDataPtrOnStream(tensor.storage().data_ptr(), prepare_);
    guard_.recordDataPtrOnStream(tensor.storage().data_ptr(), communicate_);
  }

 private:
  const c10::Device device_;
  const c10::impl::VirtualGuardImpl guard_;
  const c10::Stream prepare_;
  const c10::Stream communicate_;
};

}  // namespace arc_topk
