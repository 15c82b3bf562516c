// The CUDA kernels' bodies on the host: the same text, block after block, each phase a loop over
// its threads. What it cannot show: races within a phase, and threads that disagree on whether to
// enter a phase.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/steps.h"

namespace arc_topk::testing {

template <int kCount>
class HostBlock {
 public:
  static constexpr int kThreads = kCount;

  template <class T>
  struct Each {
    std::array<T, kCount> values{};
    decltype(auto) operator[](int t) { return values[static_cast<size_t>(t)]; }
  };

  HostBlock(int64_t index, int64_t blocks) : index_(index), blocks_(blocks) {}
  int64_t index() const { return index_; }
  int64_t blocks() const { return blocks_; }
  template <class F>
  void each(const F& f) const {
    for (int t = 0; t < kCount; ++t) f(t);
  }
  void sync() const {}
  void fence() const {}
  uint32_t add(uint32_t* at, uint32_t x) const { return std::exchange(*at, *at + x); }
  void add(double* at, double x) const { *at += x; }
  template <class T>
  static T fresh(const T* at) {
    return *at;
  }
  bool any(Each<bool>& x) const {
    return std::find(x.values.begin(), x.values.end(), true) != x.values.end();
  }
  int count(Each<bool>& x) const {
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
  uint32_t exclusive_sums(Each<uint32_t>& x, uint32_t (&)[cuda::kWarp]) const {
    uint32_t sum = 0;
    for (uint32_t& value : x.values) sum += std::exchange(value, sum);
    return sum;
  }

 private:
  const int64_t index_;
  const int64_t blocks_;
};

// Blocks in an order that no kernel may rely on.
class HostLauncher {
 public:
  template <class Body>
  void launch(const Bucket&, const char* name, const Body& body, int64_t blocks) const {
    launched.push_back(name);
    std::vector<int64_t> order(static_cast<size_t>(blocks));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::shuffle(order.begin(), order.end(), random);
    for (const int64_t index : order) {
      const auto shared = std::make_unique<typename Body::Shared>();
      // Shared memory holds anything at first.
      std::fill_n(reinterpret_cast<unsigned char*>(shared.get()), sizeof(*shared),
                  static_cast<unsigned char>(0xA5));
      HostBlock<Body::kThreads> block(index, blocks);
      body(block, *shared);
    }
  }
  uint32_t read(const Bucket&, const uint32_t* at) const { return *at; }

  mutable std::vector<std::string> launched;
  mutable std::mt19937 random{1};
};

class CudaOnHost : public cuda::Steps<HostLauncher> {
 public:
  HostLauncher& launcher() { return launcher_; }
};

}  // namespace arc_topk::testing

// Compiled once, in cuda_on_host.cpp: all bodies with all types take their time.
extern template class arc_topk::cuda::Steps<arc_topk::testing::HostLauncher>;
