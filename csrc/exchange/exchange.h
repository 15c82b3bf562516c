// The engine: averages the gradients of a bucket over ranks, by the configured compressor and error
// feedback. Knows tensors and process groups; knows neither DDP nor Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/util/intrusive_ptr.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "compress/compressor.h"
#include "config.h"
#include "exchange/lane.h"
#include "exchange/state.h"
#include "exchange/streams.h"

namespace c10d {
class ProcessGroup;
}

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

class Flight;

class Exchange {
 public:
  // `group`: whose ranks are averaged. `lane_group`: the same ranks in a group of the lane's own,
  // so that nobody else's collectives come between; the caller's own thread uses `group`. Null
  // where a collective of `group` only queues itself on the current stream (NCCL): then all of a
  // bucket is queued from the caller's thread, and no lane is needed.
  Exchange(Config config, c10::intrusive_ptr<c10d::ProcessGroup> group,
           c10::intrusive_ptr<c10d::ProcessGroup> lane_group);
  ~Exchange();

  // Begins the exchange of one bucket: `parameters` are the keys of its state, their gradients lie
  // one after the other in `buffer`. The future holds the averaged bucket: the buffer or an arena
  // of this engine, valid until the bucket's next exchange. Call from one thread at a time, in the
  // same order of buckets on every rank. `index` only names the bucket in errors.
  c10::intrusive_ptr<c10::ivalue::Future> start(const at::Tensor& buffer,
                                                const std::vector<at::Tensor>& parameters,
                                                int64_t index);
  // The same, all of it on the calling thread.
  at::Tensor run(const at::Tensor& buffer, const std::vector<at::Tensor>& parameters);

  void set_name(const at::Tensor& parameter, std::string name);

  // Reads back what devices have summed up: waits for them.
  Metrics metrics() const;
  void reset_metrics();
  const Config& config() const { return config_; }

 private:
  friend class Flight;
  Flight& flight_of(const at::Tensor& buffer, const std::vector<at::Tensor>& parameters);
  Streams* streams_of(const BucketState& state);
  Projection projection(uint64_t step, const BucketState& state);
  std::string describe(const BucketState& state, int64_t index) const;

  const Config config_;
  const c10::intrusive_ptr<c10d::ProcessGroup> group_;
  const c10::intrusive_ptr<c10d::ProcessGroup> lane_group_;
  const int rank_;
  const int world_size_;

  StateStore store_;
  std::unique_ptr<Streams> streams_;  // of the device that the first bucket with streams was on

  // V of the step it was last made for. Only the thread that prepares touches it.
  at::Tensor v_;
  uint64_t v_step_ = 0;
  int64_t v_rows_ = 0;

  mutable std::mutex mutex_;  // of what the preparing thread, the lane and the user all touch:
  Metrics metrics_;
  std::string failure_;  // the first bucket's that failed: later ones fail at once, none hangs
  std::unordered_map<const c10::TensorImpl*, std::string> names_;

  Lane lane_;  // last: joined before anything it uses goes
};

}  // namespace arc_topk
