// Kernels on buckets in host memory, whatever memory they work on: for each call all that a bucket
// points to goes to the device, and comes back. So one text tests the CUDA kernels on a GPU, and
// their bodies on the host, where "the device" is other memory of the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <functional>
#include <optional>
#include <vector>

#include "kernels/kernels.h"

namespace arc_topk::testing {

// Stretches of host memory, and their copy in a device's memory.
class Twin {
 public:
  explicit Twin(c10::Device device) : device_(device) {}

  // Those that overlap stay one: what lies inside another's memory does so there as well.
  void add(const void* at, int64_t bytes);
  // All of them to the device, at the same places within 256 bytes. What is left on the host is
  // ones (NaN, -1) until come_back(): a kernel that gets hold of a host address is found out.
  void go();
  // Throws std::logic_error where something was written before or behind a stretch.
  void come_back();

  // The address there of what lies here. Null stays null, and so does what has no bytes.
  template <class T>
  T* there(T* at) const {
    return static_cast<T*>(const_cast<void*>(find(at)));
  }

 private:
  struct Stretch {
    char* host;
    int64_t bytes;
    int64_t offset;  // in either of the tensors
  };
  void merge();
  int64_t lay_out(uintptr_t base);
  const void* find(const void* at) const;
  void expect_ones(int64_t begin, int64_t end) const;

  c10::Device device_;
  std::vector<Stretch> stretches_;
  at::Tensor staging_;
  at::Tensor memory_;
};

class OnDevice final : public Kernels {
 public:
  // `inner` work on the device's memory, on Bucket::stream where it has streams. Throws where there
  // is no such device.
  OnDevice(const Kernels& inner, c10::Device device);

  Grain grain() const override { return inner_.grain(); }
  int64_t scratch_bytes(const Bucket& b) const override { return inner_.scratch_bytes(b); }
  void begin_range(const char* name) const override { inner_.begin_range(name); }
  void end_range() const override { inner_.end_range(); }

  void project(const Bucket& b, float* data, int64_t stride, int64_t begin, int64_t end,
               uint64_t seed, uint64_t step) const override;
  void reclaim(const Bucket& b) const override;
  void prepare(const Bucket& b, const Projection* v) const override;
  void select(const Bucket& b, const Keys& keys) const override;
  void pack(const Bucket& b) const override;
  void commit(const Bucket& b, const Gathered* gathered) const override;
  void pack_and_commit(const Bucket& b) const override;
  void apply(const Bucket& b, const Gathered* gathered) const override;
  bool publish(const Bucket& b) const override;
  void divide(const Bucket& b) const override;
  void remember(const Bucket& b) const override;
  bool adopt(const Bucket& b) const override;
  void blend(const Bucket& b) const override;

 private:
  using Work = std::function<void(const Bucket&)>;
  // work(the bucket there), with `twin` for what else was added to it.
  void run(Twin& twin, const Bucket& b, const Work& work) const;
  void run(const Bucket& b, const Work& work) const;
  void run_gathered(const Bucket& b, const Gathered* gathered,
                    const std::function<void(const Bucket&, const Gathered*)>& work) const;

  const Kernels& inner_;
  const c10::Device device_;
  std::optional<c10::Stream> stream_;  // not the default one, so that all must use what it is told
};

}  // namespace arc_topk::testing
