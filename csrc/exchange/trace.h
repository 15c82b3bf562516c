// A phase of a bucket's step as profilers show it: RECORD_FUNCTION for torch.profiler, and the
// device's own ranges (NVTX) for Nsight. Costs a look at a flag where nobody profiles.
#pragma once

#include <ATen/record_function.h>

#include <optional>
#include <string>

#include "compress/compressor.h"

namespace arc_topk {

class TraceRange {
 public:
  ~TraceRange() { end(); }

  void begin(const Kernels& kernels, Phase phase, int64_t bucket) {
    end();
    kernels_ = &kernels;
    kernels.begin_range(name_of(phase));
    record_.emplace(at::RecordScope::USER_SCOPE);
    if (!record_->isActive()) return;
    record_->before("arc_topk " + std::string(name_of(phase)) + ", bucket " +
                    std::to_string(bucket));
  }
  void end() {
    record_.reset();
    if (kernels_ != nullptr) kernels_->end_range();
    kernels_ = nullptr;
  }

 private:
  std::optional<at::RecordFunction> record_;
  const Kernels* kernels_ = nullptr;
};

}  // namespace arc_topk
