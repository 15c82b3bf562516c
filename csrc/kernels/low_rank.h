// What low rank (compress/low_rank.cpp) wants of a device, beside Kernels. Of each matrix X_i of m
// rows and n columns it keeps three factors of k columns between steps: P^ and R_i of the step
// before, and the basis W of the coming one.
//
// The residual is never written in a pass of its own. At any moment it is e_i = own_a - P^ R_i^T:
// prepare() forms it in passing, leaves the message X_i = g_i + e_i in own_a and sets R_i to zero;
// multiply_back() sets R_i to what it sends. A step that fails anywhere between leaves a residual
// that holds all that was not sent, and a skipped step is given back by a change of R_i alone.
//
// P^, R, W and C are the same bits on every rank, whatever its processor: sums in a fixed order,
// nothing fused.
#pragma once

#include "kernels/kernels.h"

namespace arc_topk {

class LowRankKernels {
 public:
  virtual ~LowRankKernels() = default;

  // --- before the first collective --------------------------------------------------------------
  // Draws the columns of W that are zero. Then one pass over gradient and state: X_i = g_i + e_i
  // into own_a, X_i W into `first`, and on an uint8 wire what directions.h makes of it into
  // `directions`; used[], bad[] and this rank's flags as Kernels::prepare() sets them, dense
  // segments into their payload. What is not used[] here is not stored.
  virtual void prepare(const Bucket& b, uint64_t seed, uint64_t step) const = 0;

  // --- between the collectives ------------------------------------------------------------------
  // Reads outcome[] off the summed flags and brings own state to what it demands, as
  // Kernels::commit() does. Of normal segments P^ = orth(P), P the summed first payload: a column
  // that adds nothing to those before it, or has overflowed, becomes zero. On an uint8 wire P is
  // what came back of the directions, and the columns of R get their units.
  virtual void orthonormalise(const Bucket& b) const = 0;
  // R_i = X_i^T P^ of normal segments, rounded to the wire type, into `second`, and as it is sent
  // into the right factor: with that it has left the residual. What has overflowed is sent as zero.
  // Others send zeros.
  virtual void multiply_back(const Bucket& b) const = 0;

  // --- after the last collective ----------------------------------------------------------------
  // R, the mean, from the summed second payload; W, its columns at unit norm; C = P^ R^T, or what
  // another outcome demands, into `gradient`. Dense segments as Kernels::apply() does.
  virtual void apply(const Bucket& b) const = 0;

  // --- between steps ----------------------------------------------------------------------------
  // own_a = e_i, and R_i = 0. Changes no later bit: prepare() rounds e_i as if it had been stored.
  virtual void settle(const Bucket& b) const = 0;
  // As Kernels::reclaim(): e_i += C where the scaler has skipped the step before, by R_i -= R.
  virtual void reclaim(const Bucket& b) const = 0;
};

}  // namespace arc_topk
