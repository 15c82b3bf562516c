// Counts what the process takes from the heap by operator new, on any thread.
#pragma once

#include <cstdint>

namespace arc_topk::testing {
int64_t heap_allocations();
}
