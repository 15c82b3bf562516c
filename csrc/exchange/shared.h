// What all buckets of an engine share.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <memory>
#include <optional>

#include "config.h"
#include "exchange/adaptive.h"
#include "exchange/lanes.h"
#include "exchange/lifecycle.h"
#include "exchange/metrics.h"
#include "exchange/projection.h"
#include "exchange/streams.h"
#include "state/state_store.h"

namespace c10d {
class ProcessGroup;
}

namespace arc_topk {

// The groups that an engine averages over.
struct Groups {
  // Whose ranks are averaged; the caller's own thread uses it.
  c10::intrusive_ptr<c10d::ProcessGroup> main;
  // The same ranks in groups of the lanes' own, so that nobody else's collectives come between.
  // Null where a collective of `main` only queues itself on the current stream (NCCL): then all of
  // a bucket is queued from the caller's thread, and no thread is needed. Without a second one all
  // collectives go over the first, bucket after bucket.
  c10::intrusive_ptr<c10d::ProcessGroup> first{};
  c10::intrusive_ptr<c10d::ProcessGroup> second{};

  bool block() const { return first != nullptr; }  // collectives, whoever makes them
};

struct Shared {
  Shared(Config config, Groups groups);

  // The streams that serve a device of such; null for a device without any. All buckets with
  // streams must be on one device.
  Streams* streams_for(const std::optional<c10::Device>& device);

  const Config config;
  Groups groups;
  int rank;
  StateStore store;
  at::Tensor loss_scale;             // of a GradScaler, who changes it in place; undefined: none
  std::unique_ptr<Streams> streams;  // of the device that the first bucket with streams was on
  SharedProjection projection;
  Lifecycle lifecycle;
  MetricsSum metrics;
  std::optional<Adaptive> adaptive;  // by Config::adaptive
  Lanes lanes;
};

}  // namespace arc_topk
