// The CUDA kernels' bodies on the host, watched for races.
#pragma once

#include "cuda_on_host.h"
#include "race_checker.h"

namespace arc_topk::testing::race {

class WatchedKernels : public cuda::Steps<HostLauncher<Watch>> {
 public:
  const std::vector<std::string>& launched() const { return launcher_.launched; }
};

}  // namespace arc_topk::testing::race

extern template class arc_topk::cuda::Steps<
    arc_topk::testing::HostLauncher<arc_topk::testing::race::Watch>>;
extern template class arc_topk::cuda::LowRankSteps<
    arc_topk::testing::HostLauncher<arc_topk::testing::race::Watch>>;
