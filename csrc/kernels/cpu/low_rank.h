// Low rank on the CPU: a table of what is done to one piece, tile or segment on one thread, one
// table for each instruction set as in rows.h, and what shares them out between threads.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/low_rank.h"

namespace arc_topk::cpu {

struct LowRankSteps {
  // --- a segment ---
  void (*draw)(const Bucket&, const Segment&, uint64_t seed, uint64_t step);
  // Whether R_i is not zero: own_a is not the residual itself.
  bool (*pending)(const Bucket&, const Segment&);
  void (*forget)(const Bucket&, const Segment&);  // R_i = 0
  void (*orthonormalise)(const Bucket&, const Segment&);
  // The sums over strips, one after the other: R_i, to the wire. Not `normal`: zeros to the wire.
  void (*send)(const Bucket&, const Segment&, bool normal);
  void (*receive)(const Bucket&, const Segment&);  // R and W
  void (*reclaim)(const Bucket&, const Segment&);

  void (*send_directions)(const Bucket&, const Segment&, bool used);  // of P_i, and norms

  // --- a piece: whole rows ---
  // X_i, stored if `store`, and its product with W. Returns whether every candidate was finite.
  bool (*prepare)(const Bucket&, const Piece&, bool store);
  void (*settle)(const Bucket&, const Piece&);  // own_a = e_i; R_i stays
  void (*apply)(const Bucket&, const Piece&, Outcome);

  // --- a tile ---
  void (*multiply_back)(const Bucket&, const Piece&);
};

class CpuLowRank final : public LowRankKernels {
 public:
  CpuLowRank(const CpuKernels& kernels, const Rows& rows, const LowRankSteps& steps)
      : kernels_(kernels), rows_(rows), steps_(steps) {}

  void prepare(const Bucket& b, uint64_t seed, uint64_t step) const override;
  void orthonormalise(const Bucket& b) const override;
  void multiply_back(const Bucket& b) const override;
  void apply(const Bucket& b) const override;
  void settle(const Bucket& b) const override;
  void reclaim(const Bucket& b) const override;

 private:
  const CpuKernels& kernels_;
  const Rows& rows_;
  const LowRankSteps& steps_;
};

}  // namespace arc_topk::cpu
