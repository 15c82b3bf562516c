// What the compiler calls under -fsanitize=thread, in place of the sanitizer's runtime.
#include <cstddef>

#include "race_checker.h"

using arc_topk::testing::race::read;
using arc_topk::testing::race::write;

#define ARC_TOPK_HOOKS(bytes)                                            \
  void __tsan_read##bytes(const void* at) { read(at, bytes); }           \
  void __tsan_write##bytes(void* at) { write(at, bytes); }               \
  void __tsan_unaligned_read##bytes(const void* at) { read(at, bytes); } \
  void __tsan_unaligned_write##bytes(void* at) { write(at, bytes); }     \
  void __tsan_volatile_read##bytes(const void* at) { read(at, bytes); }  \
  void __tsan_volatile_write##bytes(void* at) { write(at, bytes); }

extern "C" {
ARC_TOPK_HOOKS(1)
ARC_TOPK_HOOKS(2)
ARC_TOPK_HOOKS(4)
ARC_TOPK_HOOKS(8)
ARC_TOPK_HOOKS(16)
void __tsan_read_range(const void* at, size_t bytes) { read(at, bytes); }
void __tsan_write_range(void* at, size_t bytes) { write(at, bytes); }
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// Not instrumented, whatever the size: the bodies are compiled without the compiler's own idea of
// memcpy(), and linked with --wrap=memcpy.
void* __real_memcpy(void* to, const void* from, size_t bytes);
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  read(from, bytes);
  write(to, bytes);
  return __real_memcpy(to, from, bytes);
}
}
