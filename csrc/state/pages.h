// Pages of memory, as the system deals them out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace arc_topk {

// advice of whole pages of `size` bytes in it. A wish, which the system may refuse.
inline void advise_pages(void* memory, size_t bytes, uintptr_t size, int advice) {
#if defined(__linux__)
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + size - 1) / size * size;
  const uintptr_t end = (address + bytes) / size * size;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
#else
  (void)memory, (void)bytes, (void)size, (void)advice;
#endif
}

// Huge ones for what is swept through once a step: fewer page walks, and no stop of the processor's
// prefetch at every 4 KiB. Before the memory is first touched.
inline void ask_for_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  advise_pages(memory, bytes, uintptr_t{2} << 20, MADV_HUGEPAGE);
#endif
}

// Gives memory back that is not read again before it is written, though it is not freed yet: what
// is in it is lost.
inline void forget(void* memory, size_t bytes) {
#if defined(__linux__)
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  advise_pages(memory, bytes, page, MADV_DONTNEED);
#endif
}

// f(offset, count) for parts of `numel` elements, of which only one at a time needs memory.
template <class F>
void in_parts(int64_t numel, const F& f) {
  constexpr int64_t kAtOnce = 1 << 20;
  for (int64_t done = 0; done < numel; done += kAtOnce) f(done, std::min(kAtOnce, numel - done));
}

}  // namespace arc_topk
