// The bodies as CUDA kernels. Nothing here waits, but for the one number that adopt() reads.
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda/steps.h"

namespace arc_topk {
namespace cuda {
namespace {

// How many blocks a multiprocessor should hold at least: registers are given out accordingly.
template <class Body>
constexpr int kBlocks = 2;
template <>
constexpr int kBlocks<Select<double>> = 1;           // would spill
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1200  // from there on three would spill
template <class Feedback>
constexpr int kBlocks<Prepare<Feedback, float, float, float>> = 3;  // more reads under way
#endif

template <class Body>
__global__ void __launch_bounds__(Body::kThreads, kBlocks<Body>)
    run(const __grid_constant__ Body body) {
  __shared__ typename Body::Shared shared;
  DeviceBlock<Body::kThreads> block;
  body(block, shared);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("arc_topk: CUDA kernel '") + what +
                           "': " + cudaGetErrorString(error));
}

class CudaLauncher {
 public:
  template <class Body>
  void launch(const Bucket& b, const char* name, const Body& body, int64_t blocks) const {
    const auto stream = static_cast<cudaStream_t>(b.stream);
    run<<<static_cast<unsigned>(blocks), Body::kThreads, 0, stream>>>(body);
    check(cudaGetLastError(), name);
  }

  uint32_t read(const Bucket& b, const uint32_t* at) const {
    const auto stream = static_cast<cudaStream_t>(b.stream);
    uint32_t value = 0;
    check(cudaMemcpyAsync(&value, at, sizeof(value), cudaMemcpyDeviceToHost, stream), "adopt");
    check(cudaStreamSynchronize(stream), "adopt");
    return value;
  }
};

class CudaKernels final : public Steps<CudaLauncher> {
 public:
  void begin_range(const char* name) const override { nvtxRangePushA(name); }
  void end_range() const override { nvtxRangePop(); }
};

}  // namespace
}  // namespace cuda

const Kernels* cuda_kernels() {
  static const cuda::CudaKernels kernels;
  return &kernels;
}

}  // namespace arc_topk
