// The collectives of one bucket's step: made in place, waited for, and counted.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <torch/csrc/distributed/c10d/Types.hpp>
#include <vector>

#include "exchange/lanes.h"
#include "exchange/metrics.h"

namespace c10d {
class ProcessGroup;
}

namespace arc_topk {

class Collectives {
 public:
  explicit Collectives(Lanes& lanes) : lanes_(lanes) {}

  // The group of what follows, and where its bytes are counted.
  void begin(c10d::ProcessGroup& group, Metrics& metrics);

  // Sums in place over all ranks. `payload`: a vector of one tensor.
  void all_reduce(std::vector<at::Tensor>& payload);
  // The least of all ranks', number by number.
  void least(std::vector<double>& numbers);
  // all_reduce(), not waited for.
  c10::intrusive_ptr<c10d::Work> start_all_reduce(std::vector<at::Tensor>& payload,
                                                  const c10d::AllreduceOptions& options = {});
  // `gathered` = the messages of all ranks, one after the other.
  void all_gather(at::Tensor& gathered, at::Tensor& message);

 private:
  void wait(c10d::Work& work);
  void count(int64_t wire_bytes, double link_bytes);

  Lanes& lanes_;
  c10d::ProcessGroup* group_ = nullptr;
  Metrics* metrics_ = nullptr;
};

}  // namespace arc_topk
