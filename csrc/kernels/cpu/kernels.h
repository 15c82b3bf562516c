// The CPU's kernels, and the smaller steps that they consist of, each of which has its own tests.
#pragma once

#include <memory>

#include "kernels/cpu/rows.h"

namespace arc_topk::cpu {

struct LowRankSteps;

class CpuKernels final : public Kernels {
 public:
  // Those of one instruction set.
  CpuKernels(const Rows& rows, const LowRankSteps& steps);
  ~CpuKernels() override;

  Grain grain() const override;
  const LowRankKernels* low_rank() const override;
  // The keys that rows are selected by: scores as unsigned integers of the same order. Low rank: P
  // by columns, while they are made orthonormal.
  int64_t scratch_bytes(const Bucket& b) const override;
  void project(const Bucket& b, float* data, int64_t stride, int64_t begin, int64_t end,
               uint64_t seed, uint64_t step) const override;
  void reclaim(const Bucket& b) const override;
  void prepare(const Bucket& b, const Projection* v) const override;
  void select(const Bucket& b, const Keys& keys) const override;
  void pack(const Bucket& b) const override;
  void commit(const Bucket& b, const Gathered* gathered) const override;
  void pack_and_commit(const Bucket& b) const override;
  void apply(const Bucket& b, const Gathered* gathered) const override;
  bool publish(const Bucket& b) const override;
  void divide(const Bucket& b) const override;
  void remember(const Bucket& b) const override;
  bool adopt(const Bucket& b) const override;
  void blend(const Bucket& b) const override;

  // --- steps of prepare() ---
  // used[] of compressed segments. Stops reading a segment at its first non-zero element, so it
  // costs nothing for a tensor that has a gradient.
  void scan(const Bucket& b) const;
  // State, bad[], sketches, dense copies; everything but used[] and the flags.
  void update(const Bucket& b, const Projection* v) const;
  void write_flags(const Bucket& b) const;

  // --- steps of select() and commit() ---
  // outcome[] from the flags, summed here over `copies` that lie `stride` bytes apart (1 after an
  // all-reduce, world_size after an all-gather). `flags` need not be b.flags.
  void read_flags(const Bucket& b, const void* flags, int64_t copies, int64_t stride) const;
  // Prepares what update() held back where some other rank has used the tensor; takes back what it
  // stored where some rank's gradient was non-finite.
  void settle(const Bucket& b) const;
  double score(const Bucket& b) const;  // the sum of all scores of normal segments
  void randomize(const Bucket& b, uint64_t seed, uint64_t step) const;
  void magnitudes(const Bucket& b) const;
  void pick(const Bucket& b) const;  // the K largest keys of each normal segment
  // The same of its message's magnitudes, where it lies in the work type.
  void pick(const Bucket& b, const void* message) const;
  void pack(const Bucket& b, PackMode mode) const;

  // --- steps of apply(): each gives the bucket's ||C||^2 ---
  double apply_reduced(const Bucket& b) const;
  double apply_gathered(const Bucket& b, const Gathered& gathered) const;

 private:
  // The outcome of dense segments, from their means. used[] and bad[] are free for it: of a dense
  // segment they mean nothing else.
  void mark_dense(const Bucket& b, int64_t shift, int64_t copies, int64_t stride) const;

  const Rows& rows_;
  const std::unique_ptr<const LowRankKernels> low_rank_;
};

// The CPU's kernels by one table: for tests. cpu_kernels() takes the last.
const CpuKernels& kernels_with(const Rows& table);

}  // namespace arc_topk::cpu
