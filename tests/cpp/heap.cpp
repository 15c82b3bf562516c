// A program's operator new takes the place of its libraries', so this counts libtorch's allocations
// as well as ours. In a file of its own: inlined elsewhere, the compiler would see malloc meet
// delete.
#include "heap.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {
std::atomic<int64_t> allocations{0};
}

void* operator new(std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return std::malloc(size == 0 ? 1 : size);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace arc_topk::testing {
int64_t heap_allocations() { return allocations.load(std::memory_order_relaxed); }
}  // namespace arc_topk::testing
