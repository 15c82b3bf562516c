// The CUDA kernels, or their bodies on the host, against the CPU's: buckets of the same contents,
// and whole steps over them. The first difference is thrown. No GoogleTest here: Python's tests of
// layouts (layouts.cpp) call it too.
#pragma once

#include <functional>
#include <stdexcept>
#include <vector>

#include "bucket_in_memory.h"

namespace arc_topk::testing {

class Difference : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A bucket with the pieces and the scratch memory that some kernels want, by default CUDA's.
class CudaBucket : public BucketInMemory {
 public:
  explicit CudaBucket(const BucketSpec& spec);
  CudaBucket(const BucketSpec& spec, const Kernels& kernels);

  // h, whatever stands in its place.
  double estimate(int64_t i) const;

 private:
  std::vector<uint64_t> scratch_;
};

// Both backends on buckets of the same contents. The flags are told by themselves here: in
// BucketInMemory they lie apart from the payloads.
//
// All expect_...() throw a Difference that says `when` it was found, where, and what.
struct Pair {
  Pair(const BucketSpec& spec, const Kernels& kernels);

  Projection host_v() const { return {host.v.data(), v.stride}; }
  // f(kernels, bucket) for the CPU's and for CUDA's.
  template <class F>
  void both(const F& f) {
    f(cpu_kernels(), host);
    f(kernels, cuda);
  }

  // Everything that is the bucket's own, bit by bit.
  void expect_same_state(const char* when) const;
  // used[], bad[] and outcome[] of compressed tensors.
  void expect_same_marks(const char* when) const;
  void expect_same_flags(const char* when) const;
  // Of tensors whose outcome is normal.
  void expect_same_picks(const char* when) const;
  void expect_same_second(const char* when) const;
  // Sums that are made in another order.
  void expect_close_first(const char* when) const;
  void expect_close_energy(const char* when) const;
  // What DDP is handed, from where either says that it lies. Of a tensor that is not finite all is
  // NaN, or the first element of h.
  void expect_same_result(const char* when) const;

  const Kernels& kernels;
  CudaBucket host;
  CudaBucket cuda;
  Projection v;
};

// What the sum over ranks makes of this rank's flags: some other rank has used every tensor of an
// odd number.
void set_flags(const Bucket& b);

using Change = std::function<void(BucketInMemory&)>;

// Two steps of ARC-Top-K: what the first has withheld is there again in the second. `change` is
// what is done to both buckets before.
void sketched_steps(const BucketSpec& spec, const Kernels& kernels, const Change& change);
// A step of Rand-K, whose payload goes out before anybody knows what the other ranks have.
void random_step(BucketSpec spec, const Kernels& kernels, const Change& change);

}  // namespace arc_topk::testing
