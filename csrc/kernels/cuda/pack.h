// The selected rows of the message: onto the wire, and out of what this rank still has to send.
// What the outcome demands of the rest of a piece's state comes first.
#pragma once

#include "kernels/cuda/levels.h"

namespace arc_topk::cuda {

// The picks of a piece: [first, last) of its segment's.
struct PickRange {
  int64_t first;
  int64_t last;
};
template <class Block>
ARC_TOPK_DEVICE PickRange picks_of(Block& block, const Bucket& b, const Segment& s,
                                   const Piece& p) {
  const int32_t* picks = b.picks + s.pick;
  const int64_t first =
      count_below(block, s.kept, p.row_begin, [&](int64_t k) { return picks[k]; });
  const int64_t most = smaller<int64_t>(s.kept - first, p.row_end - p.row_begin);
  return {first,
          first + count_below(block, most, p.row_end, [&](int64_t k) { return picks[first + k]; })};
}

// The vectors of a piece's picked rows: f(t, run, to, row). `run` is what lies within the tensor,
// which the last row may leave early; `to` is the vector's place in the payload, where rows are
// whole; `row` is the segment's row.
template <int kVector, class Block, class F>
ARC_TOPK_DEVICE void for_picked(Block& block, const Bucket& b, const Segment& s, const Piece& p,
                                PickRange range, const F& f) {
  // A row begins anywhere in a vector.
  const auto each =
      static_cast<uint32_t>(divide_up(p.col_end - p.col_begin + kVector - 1, kVector));
  const auto count = static_cast<uint32_t>(range.last - range.first) * each;  // far below 2^32
  block.each([&](int t) {
    for (auto i = static_cast<uint32_t>(t); i < count; i += Block::kThreads) {
      const int64_t k = range.first + i / each;
      const int64_t row = (b.picks + s.pick)[k];
      const int64_t start = s.offset + row * s.cols;
      const Run run = run_of<kVector>(start + p.col_begin, start + p.col_end, i % each);
      if (run.first < run.last)
        f(t, run.before(s.offset + s.numel), run.moved(s.packed + k * s.cols - start), row);
    }
  });
}

enum class PackMode : uint8_t {
  kPayload,  // fill the payload; the state stays as it is (the outcome is not known yet)
  kCommit,   // the payload has gone out: settle the state, account for what was sent
  kBoth,     // settle, fill and account in one go
};

template <class Feedback, class T>
struct Pack {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kStates = own_states(Feedback::kKind);
  static constexpr bool kKeeps = keeps_message(Feedback::kKind);
  static constexpr int kVector = kVectorOf<T>;
  using State = Arrays<Feedback, AnyType, AnyType, T>;
  struct Shared {};

  Bucket b;
  Feedback feedback;
  Wire<T> wire;
  Levels<T> levels;
  PackMode mode;
  bool has_gathered;
  Gathered gathered;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    if (!s.compressed()) return;
    const Outcome outcome = outcome_of(block, s, p);
    bool prepared = b.used[p.segment] != 0;
    if (mode != PackMode::kPayload) {
      settle(block, s, p, outcome, prepared);
      prepared = true;
    }
    if (outcome == Outcome::kNormal && b.bad[p.segment] == 0) {
      send(block, s, p, prepared);
    } else if (mode != PackMode::kCommit && is_first(p)) {
      send_zeros(block, s);
    }
  }

 private:
  // In kBoth the selection has read it off the flags, in kPayload nobody can know it yet.
  template <class Block>
  ARC_TOPK_DEVICE Outcome outcome_of(Block& block, const Segment& s, const Piece& p) const {
    if (mode == PackMode::kPayload) return Outcome::kNormal;
    if (mode == PackMode::kBoth) return b.outcome[p.segment];
    const Outcome outcome = read_outcome(b, s, has_gathered ? &gathered : nullptr);
    block.each([&](int t) {
      if (t == 0 && is_first(p)) b.outcome[p.segment] = outcome;
    });
    return outcome;
  }

  // Prepares what was held back where some other rank has used the tensor, takes back what was
  // stored where some rank's gradient was non-finite.
  template <class Block>
  ARC_TOPK_DEVICE void settle(Block& block, const Segment& s, const Piece& p, Outcome outcome,
                              bool stored) const {
    if constexpr (kKeeps) {
      const bool prepares = !stored && outcome == Outcome::kNormal;
      const bool undoes = stored && outcome == Outcome::kNonFinite;
      if (!prepares && !undoes) return;
      const State state(b, LossScale<T>(b));
      const Range range = range_of(s, p);
      for_runs<kVector>(block, range.begin, range.end, [&](Run run) {
        Values<T, kVector> e;
        T x[kVector];
        state.load(run, e);
        form(feedback, state.a, e, x);
        if (undoes) undo(feedback, state.a, e, x);
        state.a.store(run, x);
      });
      // picks_of() has the barrier, before send() reads it.
    }
  }

  template <class Block>
  ARC_TOPK_DEVICE void send(Block& block, const Segment& s, const Piece& p, bool prepared) const {
    const State state(b, LossScale<T>(b));
    const Array<AnyType> payload(b.second, b.wire_type);
    const PickRange range = picks_of(block, b, s, p);
    for_picked<kVector>(block, b, s, p, range, [&](int, Run run, Run to, int64_t row) {
      Values<T, kVector> e;
      T x[kVector];
      if (kKeeps && prepared) {
        state.load_own(run, e);
      } else {
        state.load(run, e);
      }
      message(feedback, state.a, e, prepared, x);
      if (levels.used) {
        send_levels(b, s, levels, row, run, to, mode != PackMode::kCommit, x);
      } else {
        ARC_TOPK_UNROLL
        for (int j = 0; j < kVector; ++j) x[j] = run.has(j) ? wire.sent(x[j]) : T(0);
        if (mode != PackMode::kCommit) payload.store(to, x);
      }
      if (mode == PackMode::kPayload || kStates == 0) return;
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const bool exact = levels.used || wire.exact;
        const T sent = exact ? x[j] : wire.received(payload.rounded(x[j]));
        T none = 0;
        feedback.sent(sent, e.a[j], kStates > 1 ? e.b[j] : none);
      }
      state.a.store(run, e.a);
      if (kStates > 1) state.b.store(run, e.b);
    });
  }

  template <class Block>
  ARC_TOPK_DEVICE void send_zeros(Block& block, const Segment& s) const {
    const Array<AnyType> payload(b.second, b.wire_type);
    for_runs<1>(block, s.packed, s.packed + s.kept * s.cols, [&](Run run) {
      if (levels.used) {
        static_cast<uint8_t*>(b.second)[run.index] = levels.byte(T(0));
      } else {
        const T zero[1] = {T(0)};
        payload.store(run, zero);
      }
    });
  }
};

// What was sent of the picked rows, back into the residual.
template <class T>
struct Reclaim {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVector = kVectorOf<T>;
  struct Shared {};

  Bucket b;
  T share;
  Levels<T> levels;

  template <class Block>
  ARC_TOPK_DEVICE void operator()(Block& block, Shared&) const {
    if (!was_skipped(b)) return;
    const Piece& p = b.pieces[block.index()];
    const Segment& s = b.segments[p.segment];
    if (!s.compressed() || b.outcome[p.segment] != Outcome::kNormal) return;
    const Array<AnyType> residual(b.own_a, b.state_type);
    const Array<AnyType> payload(b.second, b.wire_type);
    const PickRange range = picks_of(block, b, s, p);
    for_picked<kVector>(block, b, s, p, range, [&](int, Run run, Run from, int64_t row) {
      T e[kVector];
      T sent[kVector];
      residual.load(run, e);
      if (levels.used) {
        mean_of_levels(b, s, levels, row, from, sent);
      } else {
        payload.load(from, sent);
        multiply(sent, share);
      }
      ARC_TOPK_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const T sum = e[j] + sent[j];
        e[j] = is_finite(residual.rounded(sum)) ? sum : e[j];
      }
      residual.store(run, e);
    });
  }
};

}  // namespace arc_topk::cuda
