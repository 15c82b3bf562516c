#include "cuda_on_host.h"

template class arc_topk::cuda::Steps<arc_topk::testing::HostLauncher<arc_topk::testing::Unwatched>>;
template class arc_topk::cuda::LowRankSteps<
    arc_topk::testing::HostLauncher<arc_topk::testing::Unwatched>>;
