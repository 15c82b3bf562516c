// Numbers smaller than the smallest normal one.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arc_topk::cpu {

// While it lives this thread keeps them, whatever torch.set_flush_denormal() has said: squares of
// small sketches are such numbers, and a rank that takes them for zeros would select other rows.
class GradualUnderflow {
 public:
  GradualUnderflow() : before_(control()) { set(before_ & ~kFlush); }
  ~GradualUnderflow() { set(before_); }
  GradualUnderflow(const GradualUnderflow&) = delete;
  GradualUnderflow& operator=(const GradualUnderflow&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8040;  // results, and operands
  static uint64_t control() { return _mm_getcsr(); }
  static void set(uint64_t bits) { _mm_setcsr(static_cast<uint32_t>(bits)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = 1 << 24;
  static uint64_t control() { return __builtin_aarch64_get_fpcr64(); }
  static void set(uint64_t bits) { __builtin_aarch64_set_fpcr64(bits); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t control() { return 0; }
  static void set(uint64_t) {}
#endif

  const uint64_t before_;
};

}  // namespace arc_topk::cpu
