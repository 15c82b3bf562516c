// The CUDA kernels' bodies on the host: the same text, block after block, each phase a loop over
// its threads, both in an order that no kernel may rely on. Races within a phase and between blocks
// are for whoever watches (race_checker.h). What it cannot show: threads that disagree on whether
// to enter a phase.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/steps.h"

namespace arc_topk::testing {

// Nobody watches the bodies run. Who does has the same functions.
struct Unwatched {
  static void launch(const char* /*name*/) {}
  static void block(const void* /*shared*/, size_t /*bytes*/) {}
  static void end_block() {}
  static void thread(int /*t*/) {}
  static void all_threads() {}  // what is not told by thread is done by all of them
  static void sync() {}
  static void sync(const std::source_location& /*site*/) {}
  static void fence(const std::source_location& /*site*/) {}
  template <class T>
  static T add(T* at, T x) {
    return std::exchange(*at, *at + x);
  }
  template <class T>
  static void mark(T* at, T x) {
    *at = x;
  }
  template <class T>
  static T fresh(const T* at) {
    return *at;
  }
};

template <int kCount, class Watch>
class HostBlock {
 public:
  static constexpr int kThreads = kCount;
  using Site = std::source_location;

  template <class T>
  struct Each {
    std::array<T, kCount> values{};
    decltype(auto) operator[](int t) { return values[static_cast<size_t>(t)]; }
  };

  HostBlock(int64_t index, int64_t blocks) : index_(index), blocks_(blocks) {}
  int64_t index() const { return index_; }
  int64_t blocks() const { return blocks_; }
  // Threads in another order with every phase: all are come to, for the stride is odd.
  template <class F>
  void each(const F& f) {
    static_assert((kCount & (kCount - 1)) == 0);
    const auto first = static_cast<uint32_t>(random_());
    const auto stride = static_cast<uint32_t>(random_()) | 1u;
    for (uint32_t i = 0; i < kCount; ++i) {
      const int t = static_cast<int>((first + i * stride) % kCount);
      Watch::thread(t);
      f(t);
    }
    Watch::all_threads();
  }
  void sync(const Site& site = Site::current()) const { Watch::sync(site); }
  void fence(const Site& site = Site::current()) const { Watch::fence(site); }
  uint32_t add(uint32_t* at, uint32_t x) const { return Watch::add(at, x); }
  void add(double* at, double x) const { Watch::add(at, x); }
  template <class T>
  static void mark(T* at, T x) {
    Watch::mark(at, x);
  }
  template <class T>
  static T fresh(const T* at) {
    return Watch::fresh(at);
  }
  bool any(Each<bool>& x) const {
    Watch::sync();
    return std::find(x.values.begin(), x.values.end(), true) != x.values.end();
  }
  int count(Each<bool>& x) const {
    Watch::sync();
    return static_cast<int>(std::count(x.values.begin(), x.values.end(), true));
  }
  // Lane by lane as shuffles do it: the same order of additions.
  template <class T, int kSums>
  void group_sums(Each<cuda::Sums<T, kSums>>& x, int width) const {
    for (int offset = width / 2; offset > 0; offset /= 2) {
      const auto before = x.values;
      for (int t = 0; t < kCount; ++t) {
        for (int k = 0; k < kSums; ++k) {
          x[t].value[k] = before[t].value[k] + before[t ^ offset].value[k];
        }
      }
    }
  }
  void warp_prefix_sums(Each<uint32_t>& x) const {
    for (int t = 0; t < kCount; ++t) {
      if (t % cuda::kWarp != 0) x[t] += x[t - 1];
    }
  }

 private:
  const int64_t index_;
  const int64_t blocks_;
  std::minstd_rand random_{static_cast<uint32_t>(index_ + 1)};
};

// Blocks in another order with every launch.
template <class Watch>
class HostLauncher {
 public:
  template <class Body>
  void launch(const Bucket&, const char* name, const Body& body, int64_t blocks) const {
    using Shared = typename Body::Shared;
    launched.push_back(name);
    std::vector<int64_t> order(static_cast<size_t>(blocks));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::shuffle(order.begin(), order.end(), random);
    Watch::launch(name);
    for (const int64_t index : order) {
      const auto shared = std::make_unique<Shared>();
      // Shared memory holds anything at first.
      std::fill_n(reinterpret_cast<unsigned char*>(shared.get()), sizeof(Shared),
                  static_cast<unsigned char>(0xA5));
      Watch::block(shared.get(), sizeof(Shared));
      HostBlock<Body::kThreads, Watch> block(index, blocks);
      body(block, *shared);
      Watch::end_block();
    }
  }
  uint32_t read(const Bucket&, const uint32_t* at) const { return *at; }

  mutable std::vector<std::string> launched;
  mutable std::mt19937 random{1};
};

class CudaOnHost : public cuda::Steps<HostLauncher<Unwatched>> {
 public:
  HostLauncher<Unwatched>& launcher() { return launcher_; }
};

}  // namespace arc_topk::testing

// Compiled once, in cuda_on_host.cpp: all bodies with all types take their time.
extern template class arc_topk::cuda::Steps<
    arc_topk::testing::HostLauncher<arc_topk::testing::Unwatched>>;
extern template class arc_topk::cuda::LowRankSteps<
    arc_topk::testing::HostLauncher<arc_topk::testing::Unwatched>>;
