#include "exchange/metrics.h"

#include <algorithm>

namespace arc_topk {

void MetricsSum::add(const Metrics& one) {
  const std::lock_guard lock(mutex_);
  sum_.steps = std::max(sum_.steps, one.steps);
  sum_.compressed_steps = std::max(sum_.compressed_steps, one.compressed_steps);
  sum_.exchanges += one.exchanges;
  sum_.collectives += one.collectives;
  sum_.wire_bytes += one.wire_bytes;
  sum_.dense_bytes += one.dense_bytes;
  sum_.link_bytes += one.link_bytes;
  sum_.energy.captured += one.energy.captured;
  sum_.energy.total += one.energy.total;
  for (int i = 0; i < kNumPhases; ++i) sum_.seconds[i] += one.seconds[i];
}

Metrics MetricsSum::read() const {
  const std::lock_guard lock(mutex_);
  return sum_;
}

void MetricsSum::reset() {
  const std::lock_guard lock(mutex_);
  Metrics kept;
  kept.steps = sum_.steps;
  kept.compressed_steps = sum_.compressed_steps;
  sum_ = kept;
}

}  // namespace arc_topk
