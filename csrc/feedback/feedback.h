// Error feedback, element by element: what a rank sends (the message) and what it remembers.
//
// Each kind is a struct of three short functions over one element g of the gradient and up to two
// elements a, b of this rank's own state. They are templates over the number type, so the same text
// serves a scalar, a SIMD vector and a CUDA thread. docs/algorithm.md has the equations.
//
//   prepare(g, a, b)  update the state with this step's gradient; the message is then message()
//   message(g, a, b)  X_i, formed again from what prepare() left behind
//   sent(c, a, b)     account for c, the part of X_i that was really put on the wire (rounded)
//   undo(g, a, b)     take prepare() back, to a few units in the last place of |X_i| / (1 - eta)
#pragma once

#include <cstdint>

#include "base/portable.h"

namespace arc_topk {

enum class FeedbackKind : uint8_t { kNone, kEF14, kEF21, kEF21M };

// How many elements of own state (a, b) a kind keeps for one of the gradient, and whether all ranks
// share an estimate h, which is then what DDP gets.
constexpr int own_states(FeedbackKind kind) {
  return kind == FeedbackKind::kNone ? 0 : kind == FeedbackKind::kEF21M ? 2 : 1;
}
constexpr bool shares_estimate(FeedbackKind kind) {
  return kind == FeedbackKind::kEF21 || kind == FeedbackKind::kEF21M;
}
// Whether X_i is kept in `a` between prepare() and sent(): the message is then what is stored,
// rounded to the state's type. The others form it from the gradient whenever it is needed.
constexpr bool keeps_message(FeedbackKind kind) {
  return kind == FeedbackKind::kEF14 || kind == FeedbackKind::kEF21M;
}
// Whether h has a momentum, which a tensor that stays dense must then have as well.
constexpr bool has_momentum(FeedbackKind kind) { return kind == FeedbackKind::kEF21M; }

// No memory: X_i = g_i.
struct NoFeedback {
  static constexpr FeedbackKind kKind = FeedbackKind::kNone;
  template <class T>
  ARC_TOPK_HD void prepare(const T&, T&, T&) const {}
  template <class T>
  ARC_TOPK_HD T message(const T& g, const T&, const T&) const {
    return g;
  }
  template <class T>
  ARC_TOPK_HD void sent(const T&, T&, T&) const {}
  template <class T>
  ARC_TOPK_HD void undo(const T&, T&, T&) const {}
};

// EF14: a is e_i, the residual. X_i = g_i + e_i is kept where e_i was, so the message costs no
// memory.
struct EF14 {
  static constexpr FeedbackKind kKind = FeedbackKind::kEF14;
  template <class T>
  ARC_TOPK_HD void prepare(const T& g, T& a, T&) const {
    a = a + g;
  }
  template <class T>
  ARC_TOPK_HD T message(const T&, const T& a, const T&) const {
    return a;
  }
  template <class T>
  ARC_TOPK_HD void sent(const T& c, T& a, T&) const {
    a = a - c;
  }
  template <class T>
  ARC_TOPK_HD void undo(const T& g, T& a, T&) const {
    a = a - g;
  }
};

// EF21: a is h_i, this rank's estimate of its own gradient. X_i = g_i - h_i.
struct EF21 {
  static constexpr FeedbackKind kKind = FeedbackKind::kEF21;
  template <class T>
  ARC_TOPK_HD void prepare(const T&, T&, T&) const {}
  template <class T>
  ARC_TOPK_HD T message(const T& g, const T& a, const T&) const {
    return g - a;
  }
  template <class T>
  ARC_TOPK_HD void sent(const T& c, T& a, T&) const {
    a = a + c;
  }
  template <class T>
  ARC_TOPK_HD void undo(const T&, T&, T&) const {}
};

// EF21M: a is v_i - h_i, which is the message; b is h_i. Keeping the difference instead of the
// momentum v_i saves a subtraction and its rounding, and lets X_i be read where it lies.
template <class Scalar>
struct EF21M {
  static constexpr FeedbackKind kKind = FeedbackKind::kEF21M;
  Scalar eta;
  Scalar keep;  // 1 - eta

  template <class T>
  ARC_TOPK_HD void prepare(const T& g, T& a, T& b) const {
    a = keep * a + eta * (g - b);
  }
  template <class T>
  ARC_TOPK_HD T message(const T&, const T& a, const T&) const {
    return a;
  }
  template <class T>
  ARC_TOPK_HD void sent(const T& c, T& a, T& b) const {
    a = a - c;
    b = b + c;
  }
  template <class T>
  ARC_TOPK_HD void undo(const T& g, T& a, T& b) const {
    // eta = 1 keeps nothing of the old tracker, and needs nothing of it: v_i is set anew each step.
    if (keep != Scalar(0)) a = (a - eta * (g - b)) / keep;
  }
};

}  // namespace arc_topk
