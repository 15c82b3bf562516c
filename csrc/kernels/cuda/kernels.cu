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
constexpr int kBlocks<Select<double>> = 1;  // would spill
template <class T>
constexpr int kBlocks<Orthonormalise<T>> = 1;  // would spill
template <>
constexpr int kBlocks<PrepareFactors<double, AnyType, double>> = 1;
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
  // Host calls alone, but for the context that torch makes anyway.
  std::string why_unusable(int index) const override {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && index >= count)
      return "CUDA finds " + std::to_string(count) + " GPUs: look at CUDA_VISIBLE_DEVICES";
    int before = 0;
    cudaDeviceProp its{};
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = cudaGetDevice(&before);
    if (error == cudaSuccess) error = cudaGetDeviceProperties(&its, index);
    if (error == cudaSuccess) error = cudaSetDevice(index);
    if (error == cudaSuccess) {
      // Loads the kernel, as its first launch would.
      error = cudaFuncGetAttributes(&attributes, run<Clear>);
      const cudaError_t back = cudaSetDevice(before);
      if (error == cudaSuccess) error = back;
    }
    if (error == cudaSuccess) return {};
    cudaGetLastError();  // it is told here, and not by the next launch
    const std::string text = cudaGetErrorString(error);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
        error == cudaErrorUnsupportedPtxVersion) {
      return "its compute capability is " + std::to_string(its.major) + "." +
             std::to_string(its.minor) + ", for which this build has no kernels (" + text +
             "): build with ARC_TOPK_CUDA_ARCHS=" + std::to_string(its.major) +
             std::to_string(its.minor);
    }
    if (error == cudaErrorInsufficientDriver) {
      return "its driver is older than the CUDA toolkit that the kernels were built with (" + text +
             "): update the driver, or build with an older toolkit";
    }
    return "CUDA says: " + text;
  }
  // A stream that another's capture forbids to ask of is taken as captured.
  bool capturing(void* stream) const override {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
    if (error == cudaErrorStreamCaptureImplicit) {
      cudaGetLastError();
      return true;
    }
    check(error, "capturing");
    return status != cudaStreamCaptureStatusNone;
  }
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
