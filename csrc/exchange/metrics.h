// What an engine's exchanges cost and achieved, summed up.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>

#include "compress/compressor.h"

namespace arc_topk {

// Sums since the engine was made or the metrics were reset. Bytes and seconds are this rank's.
struct Metrics {
  uint64_t steps = 0;             // of the bucket exchanged most often, ever
  uint64_t compressed_steps = 0;  // of those, the ones after start_step and the dense first step
  uint64_t exchanges = 0;         // buckets exchanged
  uint64_t collectives = 0;
  uint64_t wire_bytes = 0;   // handed to the collectives
  uint64_t dense_bytes = 0;  // what plain averaging would have handed over
  double link_bytes = 0;     // sent over a rank's link by ring algorithms
  Energy energy{0, 0};
  std::array<double, kNumPhases> seconds{};
};

// Added to by whichever thread ends an exchange, read by any.
class MetricsSum {
 public:
  void add(const Metrics& one);
  Metrics read() const;
  void reset();  // but for the counts of steps

 private:
  mutable std::mutex mutex_;
  Metrics sum_;
};

}  // namespace arc_topk
