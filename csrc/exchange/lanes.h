// Where a bucket's step runs while collectives block whoever makes them: three threads, each fed in
// the order of buckets. The first collectives of all buckets go over one group and the second ones
// over another, each in that order on every rank; so a bucket's sketch travels while the rows of
// the one before do. What comes behind both has a thread of its own: neither it nor a callback of a
// future's keeps a collective waiting.
#pragma once

#include <array>
#include <chrono>
#include <optional>

#include "exchange/comm_thread.h"

namespace arc_topk {

struct Lanes {
  CommThread first;   // the first collective, and what leads to the second
  CommThread second;  // the second
  CommThread last;    // the result, and whoever waits for it

  // All of them, before a bucket sets out: one that could not go on would leave other ranks
  // waiting, or their next bucket meeting its own. Throws where no thread can be had.
  void start();
  // Waits until all that was submitted has gone through; whether it has, before the time was up.
  bool drain(std::optional<std::chrono::milliseconds> at_most = std::nullopt);
  // CommThread::stop() of all.
  void stop();
  // The one whose thread calls; null: none.
  CommThread* current();

 private:
  // In the order in which a bucket goes through them.
  std::array<CommThread*, 3> all() { return {&first, &second, &last}; }
};

}  // namespace arc_topk
