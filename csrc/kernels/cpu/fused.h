// prepare() and the sketch in one loop: the message goes from the registers it is formed in
// straight into the products, and is not read a second time. For arrays in the work type, where one
// register holds all lanes: two or four of them the compiler keeps in memory, and this is then
// slower than one loop after the other. The bits are the same either way.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "kernels/cpu/message.h"
#include "kernels/cpu/sketch.h"
#include "kernels/levels.h"

namespace arc_topk::cpu::ARC_TOPK_ISA {

// form() of a row, lane by lane: a source for Sketch. Stores the message where it is kept.
template <class F, class T>
class FormedRow {
  using Register = typename Wide<T, 64>::Register;
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef Bits RegisterBits __attribute__((vector_size(64)));

 public:
  struct Found {
    RegisterBits nonfinite{};
    bool nonfinite_last = false;

    bool none() const {
      const RegisterBits zero{};
      return !nonfinite_last && std::memcmp(&nonfinite, &zero, sizeof(zero)) == 0;
    }
  };

  // Row and state lie where e says.
  FormedRow(const F& feedback, const Elements<T>& e) : feedback_(feedback), e_(e) {}

  [[gnu::always_inline]] Lanes<T> lanes(int64_t c, Found& found) const {
    const Register g = load(e_.g + c);
    const Register old = kStates > 0 ? load(e_.a + c) : Register{};
    Register a = old;
    Register b = kStates > 1 ? load(e_.b + c) : Register{};
    feedback_.prepare(g, a, b);
    Register message = feedback_.message(g, a, b);
    constexpr Bits kInfinity = std::bit_cast<Bits>(std::numeric_limits<T>::infinity());
    const RegisterBits nonfinite = (std::bit_cast<RegisterBits>(message) & kInfinity) == kInfinity;
    found.nonfinite |= nonfinite;
    if constexpr (kKeeps) {
      message = nonfinite ? old : message;
      std::memcpy(e_.a + c, &message, sizeof(message));
    }
    return {{message}};
  }

  [[gnu::always_inline]] Lanes<T> last_lanes(int64_t c, int64_t n, Found& found) const {
    T buffer[Lanes<T>::kWidth];
    T* x = kKeeps ? e_.a + c : buffer;
    const Elements<T> e{e_.g + c, kStates > 0 ? e_.a + c : nullptr,
                        kStates > 1 ? e_.b + c : nullptr};
    found.nonfinite_last |= !form<T>(feedback_, e, n, x);
    return load_some_lanes<T>(x, n);
  }

  // Where it is not kept it is formed again, which costs less than to store it.
  auto again() const {
    if constexpr (kKeeps) {
      return StoredRow<T>{e_.a};
    } else {
      return *this;
    }
  }

 private:
  static constexpr int kStates = own_states(F::kKind);
  static constexpr bool kKeeps = keeps_message(F::kKind);

  [[gnu::always_inline]] static Register load(const T* from) {
    return Wide<T, 64>::load(from).lanes;
  }

  const F feedback_;
  const Elements<T> e_;
};

// Whether a segment is prepared that way.
template <class F, class T>
inline bool is_fused(const Bucket& b, const Segment& s, bool store_it) {
  constexpr int64_t kMinCols = 32;  // shorter rows are mostly tail, and faster formed by chunks
  constexpr bool kStored = own_states(F::kKind) > 0;
  if (b.gradient_type != kTypeOf<T> || (kStored && b.state_type != kTypeOf<T>)) return false;
  if (b.loss_scale != nullptr) return false;
  // EF21's message lies nowhere, to be read again for the row's unit.
  if (sends_levels(b) && F::kKind == FeedbackKind::kEF21) return false;
  return s.cols >= kMinCols && (store_it || !keeps_message(F::kKind));
}

// The rows from element `begin` up to `end` of the bucket. Returns whether all was finite.
template <class F, class T>
inline bool form_and_sketch(const Bucket& b, const F& feedback, const Sketch<T>& sketch,
                            int64_t cols, int64_t begin, int64_t end, T* p) {
  using Row = FormedRow<F, T>;
  constexpr int kStates = own_states(F::kKind);
  const auto row = [&](int64_t at) {
    return Row(feedback, {static_cast<T*>(b.gradient) + at,
                          kStates > 0 ? static_cast<T*>(b.own_a) + at : nullptr,
                          kStates > 1 ? static_cast<T*>(b.own_b) + at : nullptr});
  };
  typename Row::Found found;
  // V then no longer fits the L1 cache. Shorter rows are faster one by one: fewer streams.
  constexpr int64_t kLongRow = 1024;
  if (cols > kLongRow) {
    for (; begin + 4 * cols <= end; begin += 4 * cols, p += 4 * b.sketch_dim) {
      const Row four[] = {row(begin), row(begin + cols), row(begin + 2 * cols),
                          row(begin + 3 * cols)};
      sketch.template rows<4>(four, cols, p, found);
    }
  }
  for (; begin < end; begin += cols, p += b.sketch_dim) {
    const Row one = row(begin);
    sketch.template rows<1>(&one, std::min(cols, end - begin), p, found);
  }
  return found.none();
}

}  // namespace arc_topk::cpu::ARC_TOPK_ISA
