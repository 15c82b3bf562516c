// One text for the host and for a CUDA thread. Always inline: what several instruction sets compile
// must not be merged by the linker.
#pragma once

#if defined(__CUDACC__)
#define ARC_TOPK_HD __host__ __device__ __forceinline__
#else
#define ARC_TOPK_HD inline __attribute__((always_inline))
#endif
