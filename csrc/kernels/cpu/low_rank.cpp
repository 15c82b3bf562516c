#include "kernels/cpu/low_rank.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "kernels/cpu/underflow.h"
#include "kernels/directions.h"
#include "kernels/loss_scale.h"

namespace arc_topk::cpu {
namespace {

// Calls f(i) for i in [0, count).
template <class F>
void for_each(int64_t count, const F& f) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const GradualUnderflow kept;
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Calls f(piece, segment).
template <class F>
void for_pieces(const Bucket& b, const F& f) {
  for_each(b.num_pieces, [&](int64_t i) { f(b.pieces[i], b.segments[b.pieces[i].segment]); });
}

// Calls f(segment, index) for the compressed ones.
template <class F>
void for_compressed(const Bucket& b, const F& f) {
  for_each(b.num_segments, [&](int64_t i) {
    if (b.segments[i].compressed()) f(b.segments[i], i);
  });
}

}  // namespace

void CpuLowRank::prepare(const Bucket& b, uint64_t seed, uint64_t step) const {
  for_compressed(b, [&](const Segment& s, int64_t) { steps_.draw(b, s, seed, step); });
  kernels_.scan(b);
  std::fill_n(b.bad, b.num_segments, uint8_t{0});
  std::fill_n(b.outcome, b.num_segments, Outcome::kNormal);
  for_pieces(b, [&](const Piece& p, const Segment& s) {
    if (!s.compressed()) return rows_.copy_dense(b, p);
    if (steps_.prepare(b, p, b.used[p.segment])) return;
    std::atomic_ref(b.bad[p.segment]).store(1, std::memory_order_relaxed);
  });
  for_compressed(b, [&](const Segment& s, int64_t i) {
    if (b.used[i]) steps_.forget(b, s);
    if (sends_directions(b)) steps_.send_directions(b, s, b.used[i] != 0);
  });
  kernels_.write_flags(b);
}

void CpuLowRank::orthonormalise(const Bucket& b) const {
  kernels_.read_flags(b, b.flags, 1, 0);
  for_pieces(b, [&](const Piece& p, const Segment& s) {
    if (!s.compressed()) return;
    const bool stored = b.used[p.segment];
    const Outcome outcome = b.outcome[p.segment];
    // Used by some other rank: the message is the residual, for the gradient is zero here.
    if (!stored && outcome == Outcome::kNormal) steps_.settle(b, p);
    if (stored && outcome == Outcome::kNonFinite) rows_.undo(b, p);
  });
  for_compressed(b, [&](const Segment& s, int64_t i) {
    if (b.outcome[i] != Outcome::kNormal) return;
    if (!b.used[i]) steps_.forget(b, s);
    steps_.orthonormalise(b, s);
  });
}

void CpuLowRank::multiply_back(const Bucket& b) const {
  const Factors& f = b.factors;
  for_each(f.num_tiles, [&](int64_t i) {
    if (b.outcome[f.tiles[i].segment] == Outcome::kNormal) steps_.multiply_back(b, f.tiles[i]);
  });
  for_compressed(
      b, [&](const Segment& s, int64_t i) { steps_.send(b, s, b.outcome[i] == Outcome::kNormal); });
}

void CpuLowRank::apply(const Bucket& b) const {
  for_compressed(b, [&](const Segment& s, int64_t i) {
    if (b.outcome[i] == Outcome::kNormal) steps_.receive(b, s);
  });
  for_pieces(b, [&](const Piece& p, const Segment& s) {
    if (s.compressed()) return steps_.apply(b, p, b.outcome[p.segment]);
    rows_.apply_dense(b, p, 0, 1, 0);
  });
}

void CpuLowRank::settle(const Bucket& b) const {
  if (b.factors.right == nullptr) return;
  for_pieces(b, [&](const Piece& p, const Segment& s) {
    if (s.compressed() && steps_.pending(b, s)) steps_.settle(b, p);
  });
  for_compressed(b, [&](const Segment& s, int64_t) { steps_.forget(b, s); });
}

void CpuLowRank::reclaim(const Bucket& b) const {
  if (!was_skipped(b) || b.factors.right == nullptr) return;
  for_compressed(b, [&](const Segment& s, int64_t i) {
    if (b.outcome[i] == Outcome::kNormal) steps_.reclaim(b, s);
  });
}

}  // namespace arc_topk::cpu
