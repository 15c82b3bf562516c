#include "exchange/check.h"

#include <array>
#include <bit>
#include <cstring>

namespace arc_topk {
namespace {

constexpr size_t kLanes = 4;  // side by side, for a multiplication takes its time

// Each step is a bijection of the sum so far, so a single word that differs is never lost.
uint64_t mixed(uint64_t sum, uint64_t word) {
  return std::rotl((sum ^ word) * 0x9E3779B97F4A7C15ULL, 29);
}

uint64_t digest(const char* data, size_t bytes) {
  std::array<uint64_t, kLanes> sums{1, 2, 3, 4};
  std::array<uint64_t, kLanes> words{};
  const auto add = [&](size_t count) {
    if (count > 0) std::memcpy(words.data(), data, count);
    data += count;
    for (size_t i = 0; i < kLanes; ++i) sums[i] = mixed(sums[i], words[i]);
  };
  for (size_t left = bytes / sizeof(words); left > 0; --left) add(sizeof(words));
  words = {};
  add(bytes % sizeof(words));
  uint64_t all = bytes;
  for (const uint64_t sum : sums) all = mixed(all, sum);
  return all;
}

// The ranks whose number is not rank 0's; as many as a message has room for.
std::string others(const Digests* all, int world_size, int64_t Digests::*what) {
  constexpr int kMost = 8;
  std::string ranks;
  int count = 0;
  for (int rank = 1; rank < world_size; ++rank) {
    if (all[rank].*what == all[0].*what || ++count > kMost) continue;
    ranks += (ranks.empty() ? "" : ", ") + std::to_string(rank);
  }
  if (count > kMost) ranks += " and " + std::to_string(count - kMost) + " more";
  return ranks;
}

}  // namespace

int64_t digest_of(const at::Tensor& tensor) {
  if (!tensor.defined()) return 0;
  const at::Tensor here = tensor.cpu().contiguous();
  return static_cast<int64_t>(
      digest(static_cast<const char*>(here.const_data_ptr()), here.nbytes()));
}

std::string difference(const Digests* all, int world_size) {
  const auto differ = [&](const std::string& what, int64_t Digests::*number) {
    const std::string ranks = others(all, world_size, number);
    return ranks.empty() ? ranks : what + " of rank 0 differ from those of rank " + ranks;
  };
  const std::string rows = differ("the selected rows", &Digests::rows);
  return rows.empty() ? differ("the averaged gradients", &Digests::result) : rows;
}

}  // namespace arc_topk
