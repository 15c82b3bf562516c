// What a kernel body is written against: a block of threads. A body is one template, told as a
// sequence of phases, each of them a function of the thread's number:
//
//   block.each([&](int t) { ... });   // on the device: of threadIdx.x; on the host: a loop
//   block.sync();
//
// so that the very same text runs in a CUDA block and, block after block, in a test on the host.
// A body is a struct with its arguments, `kThreads`, the type `Shared` of its shared memory and
//
//   template <class Block> void operator()(Block& block, Shared& shared) const;
#pragma once

#include <cstdint>

#include "base/portable.h"

#if defined(__CUDACC__)
#define ARC_TOPK_DEVICE __device__ __forceinline__
#define ARC_TOPK_UNROLL _Pragma("unroll")
#else
#define ARC_TOPK_DEVICE inline
#define ARC_TOPK_UNROLL
#endif

namespace arc_topk::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Some numbers that are summed together.
template <class T, int kCount>
struct Sums {
  T value[kCount];
};

#if defined(__CUDACC__)

template <int kCount>
class DeviceBlock {
 public:
  static constexpr int kThreads = kCount;

  // One value a thread, kept from phase to phase.
  template <class T>
  struct Each {
    T value;
    ARC_TOPK_DEVICE T& operator[](int) { return value; }
  };

  ARC_TOPK_DEVICE int64_t index() const { return blockIdx.x; }
  ARC_TOPK_DEVICE int64_t blocks() const { return gridDim.x; }
  template <class F>
  ARC_TOPK_DEVICE void each(const F& f) const {
    f(static_cast<int>(threadIdx.x));
  }
  ARC_TOPK_DEVICE void sync() const { __syncthreads(); }
  // What was written before is seen by other blocks before what is written after.
  ARC_TOPK_DEVICE void fence() const { __threadfence(); }
  // Returns the old value.
  ARC_TOPK_DEVICE uint32_t add(uint32_t* at, uint32_t x) const { return atomicAdd(at, x); }
  ARC_TOPK_DEVICE void add(double* at, double x) const { atomicAdd(at, x); }
  // A value that other blocks write, from where they have written it to and not from a cache.
  template <class T>
  ARC_TOPK_DEVICE static T fresh(const T* at) {
    return *const_cast<const volatile T*>(at);
  }
  // Where many threads, or blocks, store the same value at once: not a race, but one relaxed atomic
  // store each.
  template <class T>
  ARC_TOPK_DEVICE static void mark(T* at, T x) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 4);
    if constexpr (sizeof(T) == 1) {
      asm volatile("st.relaxed.gpu.u8 [%0], %1;" ::"l"(at), "r"(uint32_t{x}) : "memory");
    } else {
      asm volatile("st.relaxed.gpu.u32 [%0], %1;" ::"l"(at), "r"(uint32_t{x}) : "memory");
    }
  }
  // Whether any thread's value is true; also a sync().
  ARC_TOPK_DEVICE bool any(Each<bool>& x) const { return __syncthreads_or(x.value); }

  // How many threads' values are true; also a sync().
  ARC_TOPK_DEVICE int count(Each<bool>& x) const { return __syncthreads_count(x.value); }

  // Every thread gets the sums of its group of `width` neighbours, a power of two up to a warp.
  template <class T, int kSums>
  ARC_TOPK_DEVICE void group_sums(Each<Sums<T, kSums>>& x, int width) const {
    for (int offset = width / 2; offset > 0; offset /= 2) {
      ARC_TOPK_UNROLL
      for (int k = 0; k < kSums; ++k) {
        x.value.value[k] += __shfl_xor_sync(0xFFFFFFFFu, x.value.value[k], offset);
      }
    }
  }

  // Adds to every thread's number those of the threads before it in its warp.
  ARC_TOPK_DEVICE void warp_prefix_sums(Each<uint32_t>& x) const {
    const int lane = threadIdx.x % kWarp;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const uint32_t below = __shfl_up_sync(0xFFFFFFFFu, x.value, offset);
      if (lane >= offset) x.value += below;
    }
  }
};

#endif

// The sums over the whole block, to thread 0, always added up in the same order.
template <class Block, class T, int kSums>
ARC_TOPK_DEVICE void block_sums(Block& block, typename Block::template Each<Sums<T, kSums>>& x,
                                Sums<T, kSums> (&warps)[kWarp]) {
  block.group_sums(x, kWarp);
  block.each([&](int t) {
    if (t % kWarp == 0) warps[t / kWarp] = x[t];
  });
  block.sync();
  block.each([&](int t) {
    if (t != 0) return;
    for (int warp = 1; warp < Block::kThreads / kWarp; ++warp) {
      for (int k = 0; k < kSums; ++k) x[t].value[k] += warps[warp].value[k];
    }
  });
  block.sync();
}

// Replaces every thread's number by the sum of those of the threads before it; returns the sum of
// all. `warps` may be used again after the next sync().
template <class Block>
ARC_TOPK_DEVICE uint32_t exclusive_sums(Block& block, typename Block::template Each<uint32_t>& x,
                                        uint32_t (&warps)[kWarp]) {
  typename Block::template Each<uint32_t> sums = x;
  block.warp_prefix_sums(sums);
  block.each([&](int t) {
    if (t % kWarp == kWarp - 1) warps[t / kWarp] = sums[t];
  });
  block.sync();
  block.each([&](int t) {
    uint32_t before = 0;
    for (int warp = 0; warp < Block::kThreads / kWarp; ++warp) {
      before += warp < t / kWarp ? warps[warp] : 0;
    }
    x[t] = before + sums[t] - x[t];
  });
  uint32_t all = 0;
  for (int warp = 0; warp < Block::kThreads / kWarp; ++warp) all += warps[warp];
  block.sync();
  return all;
}

// Adds the sum over the whole block to a number in the device's memory.
template <class Block>
ARC_TOPK_DEVICE void add_sum(Block& block, typename Block::template Each<Sums<double, 1>>& x,
                             Sums<double, 1> (&warps)[kWarp], double* to) {
  block_sums(block, x, warps);
  block.each([&](int t) {
    if (t == 0) block.add(to, x[t].value[0]);
  });
}

// Adds `weight` to a counter that starts at zero. Whether that makes `total`, so that this block is
// the last: all that the others wrote before they came here can then be read (as fresh()). The
// counter is zero again.
template <class Block>
ARC_TOPK_DEVICE bool is_last(Block& block, uint32_t* counter, uint32_t weight, uint32_t total,
                             bool& shared) {
  block.sync();
  block.each([&](int t) {
    if (t != 0) return;
    // One thread's fence is enough for what all have written before the barrier, and a fence costs
    // the whole SM its L1 cache.
    block.fence();
    shared = block.add(counter, weight) + weight == total;
    if (!shared) return;
    block.mark(counter, 0u);
    block.fence();
  });
  block.sync();
  return shared;
}

}  // namespace arc_topk::cuda
