// What moves between memory and the caches by hand. Reads: prefetch(). Writes: the last one of a
// gradient, past the caches: what is overwritten need not be read first, which is half of what such
// a write moves. A smaller bucket is left in the caches for whoever reads it next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/convert.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace arc_topk::cpu::ARC_TOPK_ISA {

// Of what is read soon, wherever it lies: nothing becomes of an address behind an array. (GCC takes
// a function that only prefetches for one that does nothing, and drops calls of it.)
[[gnu::always_inline]] inline void prefetch(const void* from, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes);
  __builtin_prefetch(reinterpret_cast<const void*>(address));
}

inline bool is_beyond_caches(const Bucket& b) {
  constexpr int64_t kBeyondCaches = int64_t{4} << 20;
  return b.numel * size_of(b.gradient_type) >= kBeyondCaches;
}
// A shorter run is mostly lines that it does not fill, and those are read all the same.
constexpr int64_t kStreamedRun = 512;

constexpr int64_t kLine = 64;

// Calls `whole` for every cache line that lies within [to, to + bytes), `part` for what lies before
// and behind: f(offset) and f(offset, bytes).
template <class Whole, class Part>
inline void for_lines(const void* to, int64_t bytes, const Whole& whole, const Part& part) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLine);
  const int64_t head = std::min(bytes, (kLine - address) % kLine);
  int64_t at = head;
  part(0, head);
  for (; at + kLine <= bytes; at += kLine) whole(at);
  part(at, bytes - at);
}

#if defined(__SSE2__)
inline void copy_streamed(const void* from, void* to, int64_t bytes) {
  const auto* source = static_cast<const char*>(from);
  auto* target = static_cast<char*>(to);
  for_lines(
      to, bytes,
      [&](int64_t at) {
        __m128i x[4];
        std::memcpy(x, source + at, kLine);
        auto* line = reinterpret_cast<__m128i*>(target + at);
        for (int i = 0; i < 4; ++i) _mm_stream_si128(line + i, x[i]);
      },
      [&](int64_t at, int64_t n) {
        std::memcpy(target + at, source + at, static_cast<size_t>(n));
      });
}
inline void zero_streamed(void* to, int64_t bytes) {
  auto* target = static_cast<char*>(to);
  for_lines(
      to, bytes,
      [&](int64_t at) {
        auto* line = reinterpret_cast<__m128i*>(target + at);
        for (int i = 0; i < 4; ++i) _mm_stream_si128(line + i, _mm_setzero_si128());
      },
      [&](int64_t at, int64_t n) { std::memset(target + at, 0, static_cast<size_t>(n)); });
}
// Before another thread may read what was streamed.
inline void end_streamed() { _mm_sfence(); }
// A register of 16, 32 or 64 bytes, to an address that is a multiple of them.
template <class Register, class T>
[[gnu::always_inline]] inline void stream_register(const Register& x, T* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(x));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(x) == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(x));
#endif
  if constexpr (sizeof(x) == 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(x));
}
#else
inline void copy_streamed(const void* from, void* to, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}
inline void zero_streamed(void* to, int64_t bytes) {
  std::memset(to, 0, static_cast<size_t>(bytes));
}
inline void end_streamed() {}
template <class Register, class T>
inline void stream_register(const Register& x, T* to) {
  std::memcpy(to, &x, sizeof(x));
}
#endif

// Writes the result into the gradient, in one kernel call over one piece.
class GradientWriter {
 public:
  explicit GradientWriter(const Bucket& b)
      : base_(b.gradient), type_(b.gradient_type), past_caches_(is_beyond_caches(b)) {}
  GradientWriter(const GradientWriter&) = delete;
  GradientWriter& operator=(const GradientWriter&) = delete;
  ~GradientWriter() {
    if (past_caches_) end_streamed();
  }

  bool past_caches() const { return past_caches_; }
  // Whether rows of so many elements, one after the other from `at` on, are whole registers.
  bool takes_registers(int64_t at, int64_t cols, int64_t bytes) const {
    const int64_t size = size_of(type_);
    const auto address = reinterpret_cast<uintptr_t>(base_) + static_cast<uintptr_t>(at * size);
    return address % static_cast<uintptr_t>(bytes) == 0 && cols * size % bytes == 0;
  }

  // store() into the gradient, of up to kChunk elements.
  template <class T>
  void put(const T* from, int64_t at, int64_t n) const {
    if (!past_caches_) return store(from, base_, type_, at, n);
    with_type(type_, [&]<class S>(S) {
      S* to = static_cast<S*>(base_) + at;
      const auto bytes = n * static_cast<int64_t>(sizeof(S));
      if constexpr (std::is_same_v<S, T>) {
        copy_streamed(from, to, bytes);
      } else {
        alignas(kLine) S narrow[kChunk];
        narrow_run(from, n, narrow);
        copy_streamed(narrow, to, bytes);
      }
    });
  }

  void zero(int64_t begin, int64_t end) const {
    const int64_t size = size_of(type_);
    void* to = byte_offset(base_, begin * size);
    const int64_t bytes = (end - begin) * size;
    if (past_caches_) return zero_streamed(to, bytes);
    std::memset(to, 0, static_cast<size_t>(bytes));
  }

 private:
  void* const base_;
  const DType type_;
  const bool past_caches_;
};

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
