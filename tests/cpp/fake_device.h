// A device with streams that does nothing but write down what it is told: in which order, on which
// stream, after what. Its kernels and collectives are real ones on CPU memory that note themselves
// as well. Everything that would make the host wait throws.
#pragma once

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace arc_topk::testing {

constexpr c10::DeviceType kFake = c10::DeviceType::PrivateUse1;
inline c10::Device fake_device() { return {kFake, 0}; }

// What was queued, and what each piece of work can rely on having been done before it.
class Journal {
 public:
  struct Entry {
    std::string what;
    int64_t stream;
    std::string text() const { return what + "@" + std::to_string(stream); }
  };

  // Work on a stream. `object` is what it reads or writes: the last work on that must come before.
  void work(std::string what, int64_t stream, const void* object = nullptr) {
    const std::lock_guard lock(mutex_);
    const size_t id = entries_.size();
    if (object != nullptr) {
      const auto last = last_.find(object);
      if (last != last_.end() && !before_[stream].contains(last->second)) {
        races_.push_back(what + "@" + std::to_string(stream) + " may run before " +
                         entries_[last->second].text());
      }
      last_[object] = id;
    }
    entries_.push_back({std::move(what), stream});
    before_[stream].insert(id);
  }
  void record(void* event, int64_t stream) {
    work("record", stream);
    const std::lock_guard lock(mutex_);
    events_[event] = before_[stream];
  }
  void block(void* event, int64_t stream) {
    work("block", stream);
    const std::lock_guard lock(mutex_);
    before_[stream].insert(events_[event].begin(), events_[event].end());
  }

  // All that `stream` holds so far comes before what `follower` gets from now on.
  void follow(int64_t follower, int64_t stream) {
    const std::lock_guard lock(mutex_);
    before_[follower].insert(before_[stream].begin(), before_[stream].end());
  }

  int64_t last_stream(const std::string& what) const {
    const std::lock_guard lock(mutex_);
    for (auto entry = entries_.rbegin(); entry != entries_.rend(); ++entry)
      if (entry->what == what) return entry->stream;
    return 0;
  }
  std::vector<std::string> texts() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::string> all;
    for (const Entry& entry : entries_) all.push_back(entry.text());
    return all;
  }
  const std::vector<std::string>& races() const { return races_; }
  void clear() {
    entries_.clear(), before_.clear(), events_.clear(), last_.clear(), races_.clear();
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Entry> entries_;
  std::map<int64_t, std::set<size_t>> before_;  // by stream: what its next work comes after
  std::map<void*, std::set<size_t>> events_;
  std::map<const void*, size_t> last_;
  std::vector<std::string> races_;
};

inline Journal& journal() {
  static Journal journal;
  return journal;
}

class FakeGuard final : public c10::impl::DeviceGuardImplInterface {
 public:
  static int64_t current() { return stream_; }

  c10::DeviceType type() const override { return kFake; }
  c10::Device exchangeDevice(c10::Device) const override { return fake_device(); }
  c10::Device getDevice() const override { return fake_device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return stream(stream_); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    journal().work("current", next.id());
    return stream(std::exchange(stream_, next.id()));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(++made_); }
  void* getStreamNativeHandle(const c10::Stream s) const override {
    return reinterpret_cast<void*>(s.id());
  }

  void record(void** event, const c10::Stream& s, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) *event = new char;
    journal().record(*event, s.id());
  }
  void block(void* event, const c10::Stream& s) const override { journal().block(event, s.id()); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<char*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream& s) const override {
    journal().work("keep", s.id());
  }

  bool queryEvent(void*) const override { throw std::logic_error("the host asks for an event"); }
  void synchronizeEvent(void*) const override { throw std::logic_error("the host waits"); }
  void synchronizeStream(const c10::Stream&) const override {
    throw std::logic_error("the host waits");
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    throw std::logic_error("the host waits");
  }

 private:
  static c10::Stream stream(int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, fake_device(), id);
  }
  static inline thread_local int64_t stream_ = 0;
  static inline int64_t made_ = 0;
};

// Makes the device known to c10, once.
inline void register_fake_device() {
  static FakeGuard guard;
  static const c10::impl::DeviceGuardImplRegistrar registrar(kFake, &guard);
}

// The CPU's kernels, noting the stream they were told and the bucket they work on.
class NotingKernels final : public Kernels {
 public:
  Grain grain() const override { return cpu_kernels().grain(); }
  int64_t scratch_bytes(const Bucket& b) const override { return cpu_kernels().scratch_bytes(b); }
  void project(const Bucket& b, float* data, int64_t stride, int64_t begin, int64_t end,
               uint64_t seed, uint64_t step) const override {
    journal().work("project", stream(b), data);
    cpu_kernels().project(b, data, stride, begin, end, seed, step);
  }
  void reclaim(const Bucket& b) const override {
    note("reclaim", b);
    cpu_kernels().reclaim(b);
  }
  void prepare(const Bucket& b, const Projection* v) const override {
    note("prepare", b);
    if (v != nullptr) journal().work("read V", stream(b), v->data);
    cpu_kernels().prepare(b, v);
  }
  void select(const Bucket& b, const Keys& keys) const override {
    note("select", b);
    cpu_kernels().select(b, keys);
  }
  void pack(const Bucket& b) const override {
    note("pack", b);
    cpu_kernels().pack(b);
  }
  void commit(const Bucket& b, const Gathered* gathered) const override {
    note("commit", b);
    cpu_kernels().commit(b, gathered);
  }
  void pack_and_commit(const Bucket& b) const override {
    note("pack_and_commit", b);
    cpu_kernels().pack_and_commit(b);
  }
  void apply(const Bucket& b, const Gathered* gathered) const override {
    note("apply", b);
    cpu_kernels().apply(b, gathered);
  }
  bool publish(const Bucket& b) const override { return cpu_kernels().publish(b); }
  bool capturing(void*) const override { return captures; }
  static inline bool captures = false;
  void divide(const Bucket& b) const override {
    note("divide", b);
    cpu_kernels().divide(b);
  }
  void remember(const Bucket& b) const override {
    note("remember", b);
    cpu_kernels().remember(b);
  }
  bool adopt(const Bucket& b) const override {
    note("adopt", b);
    return cpu_kernels().adopt(b);
  }
  void blend(const Bucket& b) const override {
    note("blend", b);
    cpu_kernels().blend(b);
  }

 private:
  static int64_t stream(const Bucket& b) { return reinterpret_cast<int64_t>(b.stream); }
  static void note(const char* what, const Bucket& b) {
    journal().work(what, stream(b), b.gradient);
  }
};

// One rank's group, whose collectives queue themselves on the current stream, as NCCL's do.
class NotingGroup final : public c10d::ProcessGroup {
 public:
  NotingGroup() : ProcessGroup(0, 1) {}
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions&) override {
    if (before_all_reduce) before_all_reduce();
    journal().work("all_reduce", FakeGuard::current());
    return c10::make_intrusive<Waited>(tensors);
  }
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions&) override {
    journal().work("all_gather", FakeGuard::current());
    outputs.at(0).at(0).copy_(inputs.at(0));
    return c10::make_intrusive<Waited>(inputs);
  }
  const std::string getBackendName() const override { return "noting"; }

  std::function<void()> before_all_reduce;

 private:
  class Waited final : public c10d::Work {
   public:
    explicit Waited(std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)) {}
    bool isCompleted() override { throw std::logic_error("the host asks for a collective"); }
    bool wait(std::chrono::milliseconds) override {
      journal().work("wait", FakeGuard::current());
      return true;
    }
    c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
      auto future = c10::make_intrusive<c10::ivalue::Future>(
          c10::ListType::create(c10::TensorType::get()), std::vector<c10::Device>{fake_device()});
      future->markCompleted(tensors_);
      return future;
    }

   private:
    const std::vector<at::Tensor> tensors_;
  };
};

}  // namespace arc_topk::testing
