// Compiled by itself, with instrumentation: all bodies with all types take their time.
#include "race_bodies.h"

template class arc_topk::cuda::Steps<
    arc_topk::testing::HostLauncher<arc_topk::testing::race::Watch>>;
template class arc_topk::cuda::LowRankSteps<
    arc_topk::testing::HostLauncher<arc_topk::testing::race::Watch>>;
