// One bucket: its plan, its error feedback in arenas that lie in bucket order, and every buffer its
// exchange needs, allocated once.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "compress/compressor.h"
#include "config.h"
#include "plan/plan.h"
#include "state/backend.h"
#include "state/torch_types.h"

namespace arc_topk {

// How far a bucket is. Shared with whoever ends its exchange, on whatever thread, so that the mark
// can be taken away even where the bucket itself is gone by then.
struct Progress {
  std::atomic<bool> busy{false};    // an exchange is queued or running: nobody else may begin one
  std::atomic<bool> failed{false};  // plain averaging, which nobody of ours waits for, has failed
  std::atomic<uint64_t> exchanges{0};  // steps completed: the count of its first parameter
};

struct BucketState {
  std::vector<Layout> layouts;  // of its tensors
  std::string first_name;       // of its first parameter, for errors; empty: nobody has named it
  c10::Device device = c10::kCPU;
  int64_t stage = 1;  // warmup_stage() of the plan's ratios
  Plan plan;
  Bucket bucket{};
  Backend backend{};
  std::vector<Piece> pieces, tiles;
  const Compressor* compressor = nullptr;

  at::Tensor own_a, own_b, shared;
  at::Tensor left, right, basis, partial;  // low rank: Bucket::factors
  // Vectors of one tensor, as collectives want them, so that a step makes none. The gradient is
  // held only while its exchange is in the air: DDP frees its buffers when it makes others.
  std::vector<at::Tensor> gradient, first, second, message;
  // What travels in place of the first payload: the same in another type, or low rank's directions.
  std::vector<at::Tensor> narrow;
  at::Tensor gathered;
  at::Tensor picks, marks, scratch, withheld, is_withheld;
  at::Tensor energy;  // an Energy, as two doubles
  at::Tensor segment_table, piece_table, place_table,
      tile_table;  // of a device with a memory of its own
  // Of this step and the one before, in turns: Bucket::loss_scale and scale_before.
  struct Scale {
    at::Tensor both, up, down;  // up and down are its two numbers
  };
  std::array<Scale, 2> scales;

  const std::shared_ptr<Progress> progress = std::make_shared<Progress>();
  uint64_t compressed = 0;  // of the exchanges, the compressed ones
  bool started = false;     // EF21, EF21M: the dense first step has set h_i and h

  // The buffer of a step, from its beginning to its end.
  void take(const at::Tensor& buffer);
  void let_go();
  // A scaler's scale, a number on any device; undefined: none. What was this step's is the step
  // before's from then on.
  void take_scale(const at::Tensor& scale);
};

// `layouts`: of its tensors, whose gradients lie one after the other in `buffer`; `shapes`: the
// same as the plan wants them; `may_be_unused`: Bucket::may_be_unused.
std::unique_ptr<BucketState> make_bucket_state(const Config& config, const Compressor& compressor,
                                               int world_size, std::vector<Layout> layouts,
                                               const std::vector<Shape>& shapes,
                                               const at::Tensor& buffer, bool may_be_unused);

}  // namespace arc_topk
