// What all ranks must hold alike behind a step, told in two numbers that are cheap to compare.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace arc_topk {

struct Digests {
  int64_t rows;    // of the rows that were selected; 0 where each rank selects its own
  int64_t result;  // of h, or of the average where there is no h
};

// Of a tensor's bytes as they lie, undefined ones have none. One element that differs always
// changes it. Reads a device's memory through the host, which waits for it.
int64_t digest_of(const at::Tensor& tensor);

// What differs between ranks, and which they are; "" where nothing does. `all`: the Digests of all
// ranks, one after the other, in host memory.
std::string difference(const Digests* all, int world_size);

}  // namespace arc_topk
